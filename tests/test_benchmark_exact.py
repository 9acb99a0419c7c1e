"""The benchmark of exact search: a figure for each number of products, and more for more."""

from benchmarks.exact import exact, measure


def test_more_products_take_longer():
    found = measure(32, [100, 50_000], searches=30)
    assert [count for count, _ in found] == [100, 50_000]
    assert 0 < found[0][1] < found[1][1]


def test_it_says_where_the_default_index_stops_to_be_exact(capsys):
    exact(dim=512, counts=[10])
    said = capsys.readouterr().out
    assert "up to 15,000 products of 512 dimensions" in said and "10 products: 0." in said
