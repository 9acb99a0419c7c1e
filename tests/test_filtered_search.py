import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tritower.commands import index as commands
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 16
COUNT = 900


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """900 products: three offers of each thing, with prices and brands."""
    folder = tmp_path_factory.mktemp("shop")
    generator = np.random.default_rng(0)
    things = generator.standard_normal((COUNT // 3, DIM))
    rows = unit(np.repeat(things, 3, axis=0) + 0.2 * generator.standard_normal((COUNT, DIM)))
    ids = [f"p{i}" if i else "a=2" for i in range(COUNT)]
    writer = EmbeddingWriter(folder / "embeddings", dim=DIM)
    writer.write("shard-0", ids, rows)
    writer.finish(["shard-0"])
    columns = {
        "id": ids,
        "price": [float(i % 100) for i in range(COUNT)],
        "brand": [("Acme", "Zed", "Nord")[i % 3] for i in range(COUNT)],
        "group_id": [f"g{i // 3}" for i in range(COUNT)],
    }
    pq.write_table(pa.table(columns), folder / "facts.parquet")
    arguments = [
        "--embeddings",
        folder / "embeddings",
        "--output",
        folder / "index",
        "--attributes",
        folder / "facts.parquet",
    ]
    assert commands.main(["build", *map(str, arguments), "--nprobe", "16"]) == 0
    return folder


@pytest.fixture(scope="module")
def vectors(shop):
    return np.concatenate(
        [batch.vectors for batch in EmbeddingReader(shop / "embeddings").batches()]
    )


def run(shop, capsys, *arguments, code=0):
    capsys.readouterr()
    assert (
        commands.main(["search", "--index", str(shop / "index"), "--json", *map(str, arguments)])
        == code
    )
    out, err = capsys.readouterr()
    return [hit["product_id"] for hit in json.loads(out)["hits"]] if code == 0 else err


def number(product):
    return 0 if product == "a=2" else int(product[1:])


def test_only_what_the_filter_matches_is_found_best_first(shop, vectors, capsys):
    found = run(
        shop,
        capsys,
        "--more-like",
        "p30",
        "--filter",
        "price<50 and brand in (Zed, Nord)",
        "--k",
        12,
    )
    fits = [i for i in range(COUNT) if i % 100 < 50 and i % 3 and i // 3 != 10]
    order = sorted(fits, key=lambda i: -float(vectors[i] @ vectors[30]))
    assert len(set(map(number, found)) & set(order[:12])) >= 11 and set(map(number, found)) <= set(
        fits
    )


def test_fewer_hits_than_wanted_are_said(shop, capsys):
    arguments = [
        "search",
        "--index",
        str(shop / "index"),
        "--more-like",
        "p30",
        "--filter",
        "price = 7 and brand = Acme",
    ]
    assert commands.main(arguments) == 0
    assert "3 hits: the filter matches 3 products" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("filter", "problem"),
    [
        ("prise < 3", "price"),
        ("price < cheap", "price"),
        ("brand in (Acme", "brand in (Acme"),
        ("", "filter"),
    ],
)
def test_a_filter_that_is_none_is_one_line(shop, capsys, filter, problem):
    error = run(shop, capsys, "--more-like", "p1", "--filter", filter, code=1)
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


def test_products_and_their_groups_are_left_out_of_what_is_like_them(shop, vectors, capsys):
    found = run(shop, capsys, "--more-like", "p30", "p60=2", "--less-like", "p90=0.5", "--k", 10)
    assert not {number(product) // 3 for product in found} & {10, 20, 30}
    query = unit(vectors[30] + 2 * vectors[60] - 0.5 * vectors[90])
    order = [i for i in np.argsort(-(vectors @ query)) if i // 3 not in (10, 20, 30)]
    assert len(set(map(number, found)) & set(order[:10])) >= 9


def test_offers_of_the_same_thing_are_found_where_they_are_wanted(shop, capsys):
    found = run(shop, capsys, "--more-like", "p30", "--include-groups", "--k", 2)
    assert sorted(found) == ["p31", "p32"]


def test_ids_may_look_like_weights(shop, capsys):
    assert run(shop, capsys, "--more-like", "a=2", "--k", 3) == run(
        shop, capsys, "--more-like", "a=2=3", "--k", 3
    )
    assert "no product 'b'" in run(shop, capsys, "--more-like", "b=2", code=1)


def test_of_each_group_one_is_found(shop, capsys):
    found = run(shop, capsys, "--more-like", "p30", "--group-by", "group", "--k", 20)
    groups = [number(product) // 3 for product in found]
    assert len(found) == 20 == len(set(groups)) and 10 not in groups


def test_many_queries_are_filtered_too(shop, tmp_path, capsys):
    arguments = [
        "--index",
        shop / "index",
        "--queries",
        shop / "embeddings",
        "--output",
        tmp_path / "hits.parquet",
    ]
    code = commands.main(
        [
            "search",
            *map(str, arguments),
            "--exclude-self",
            "--filter",
            "brand = Zed",
            "--group-by",
            "group",
            "--k",
            "5",
        ]
    )
    assert code == 0
    hits = pq.read_table(tmp_path / "hits.parquet").to_pylist()
    assert len(hits) == 5 * COUNT and all(number(hit["product_id"]) % 3 == 1 for hit in hits)
    assert all(hit["query_id"] != hit["product_id"] for hit in hits)


def test_an_index_without_attributes_says_so(shop, tmp_path, capsys):
    assert (
        commands.main(
            ["build", "--embeddings", str(shop / "embeddings"), "--output", str(tmp_path / "i")]
        )
        == 0
    )
    assert (
        commands.main(
            ["search", "--index", str(tmp_path / "i"), "--more-like", "p1", "--filter", "price<3"]
        )
        == 1
    )
    assert "holds no attributes" in capsys.readouterr().err
    assert ProductIndex.open(tmp_path / "i").attributes is None
    assert (
        commands.main(
            ["search", "--index", str(tmp_path / "i"), "--more-like", "p1", "p2", "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)["hits"]
    assert not {"p1", "p2"} & {hit["product_id"] for hit in found} and len(found) == 10
