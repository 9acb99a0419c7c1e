from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy.stats import multivariate_normal

from tritower.datamodules.samples import PRODUCT_COLUMNS, main, oracle_report, write_samples
from tritower.datamodules.samples.facts import (
    CHOICES,
    FEATURES,
    HUES,
    MATERIALS,
    PATTERNS,
    PRICE_NOISE,
    PRICE_SPREAD,
    PRODUCT_TYPES,
    SIZES,
    brand_name,
    colorway,
)
from tritower.datamodules.samples.listings import draw_listings, evidence
from tritower.datamodules.samples.oracle import (
    SHARES,
    UNKNOWN,
    Evidence,
    expected_recall,
    log_ratio,
    oracle,
    price_log_ratio,
)
from tritower.datamodules.samples.pictures import COLORS, SILHOUETTES, TEXTURES, photograph
from tritower.datamodules.samples.queries import draw_queries, text_grades

ALL = "text+image+attribute"


@pytest.fixture(scope="module")
def listings():
    return draw_listings(1500, seed=3)


@pytest.fixture(scope="module")
def queries(listings):
    return draw_queries(listings, seed=3)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples") / "raw"
    write_samples(folder, products=300, image_size=32, num_workers=1)
    return folder


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# the oracle


@pytest.mark.parametrize(("products", "seed"), [(2400, 1), (3000, 0), (3000, 1)])
def test_three_modalities_beat_every_pair_and_pairs_their_members(products, seed):
    listings = draw_listings(products, seed)
    recall = oracle_report(listings, draw_queries(listings, seed), {})["recall@10"]
    pairs = {name: value for name, value in recall.items() if name.count("+") == 1}
    assert 0.85 <= recall[ALL] <= 0.995
    assert recall[ALL] >= max(pairs.values()) + 0.10
    for name, value in pairs.items():
        assert value >= max(recall[member] for member in name.split("+")) + 0.30


def test_recall_of_ties_is_the_expectation_over_random_orders():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (1, 12)).astype(float)
    scores[0, 0] = np.nan  # the query itself
    relevant = np.zeros((1, 12), bool)
    relevant[0, [2, 5, 7]] = True
    found = []
    for _ in range(20_000):
        order = np.lexsort((rng.random(12), np.where(np.isnan(scores[0]), np.inf, -scores[0])))
        found.append(relevant[0, order[:4]].sum() / 3)
    assert expected_recall(scores, relevant, 4)[0] == pytest.approx(np.mean(found), abs=0.01)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 2.0, 1.0, 0.0], 1.0),  # the relevant one leads
        ([1.0, 2.0, 3.0, 0.0], 0.0),  # two stand above it
        ([1.0, 1.0, 1.0, 0.0], 2 / 3),  # one of three equals, two are shown
        ([1.0, 2.0, 1.0, 1.0], 1 / 3),  # one place left for three equals
        ([-np.inf, 2.0, -np.inf, 0.0], 0.0),
        ([-np.inf, 2.0, -np.inf, -np.inf], 1 / 3),
    ],
)
def test_recall_at_2_by_hand(scores, expected):
    relevant = np.array([[True, False, False, False]])
    assert expected_recall(np.array([scores]), relevant, 2)[0] == pytest.approx(expected)


def test_price_ratio_is_that_of_the_two_densities():
    r = PRICE_SPREAD**2 / (PRICE_SPREAD**2 + PRICE_NOISE**2)
    x, y = np.random.default_rng(0).standard_normal((2, 50))
    same = multivariate_normal(cov=[[1, r], [r, 1]]).logpdf(np.stack([x, y], 1))
    independent = multivariate_normal(cov=np.eye(2)).logpdf(np.stack([x, y], 1))
    assert price_log_ratio(x, y) == pytest.approx(same - independent)
    assert price_log_ratio(np.array([np.nan, 0.5]), np.array([0.5, np.nan])).tolist() == [0, 0]


def test_ratio_counts_agreements_and_ignores_what_only_one_shows():
    unknown = np.full(3, UNKNOWN)
    codes = {fact: unknown for fact in SHARES}
    codes |= {
        "product_type": np.array([1, 1, 2]),
        "size": np.array([0, UNKNOWN, 0]),
        "brand": np.array([4, 4, 4]),
    }
    scores = log_ratio(Evidence(codes, np.full(3, np.nan)), np.array([0]))
    agreed = -np.log(1 / len(PRODUCT_TYPES)) - np.log(SHARES["brand"][4])
    assert scores[0] == pytest.approx([agreed + np.log(CHOICES), agreed, -np.inf])


def test_modalities_together_show_what_each_of_them_shows():
    blank = {fact: np.array([UNKNOWN]) for fact in SHARES}
    text = Evidence({**blank, "size": np.array([2])}, np.array([np.nan]))
    attribute = Evidence({**blank, "use": np.array([0])}, np.array([0.3]))
    seen = Evidence.seen([text, attribute])
    assert (seen.codes["size"], seen.codes["use"], seen.codes["brand"], seen.price) == (
        2,
        0,
        UNKNOWN,
        0.3,
    )


def test_oracle_refuses_a_query_with_nothing_to_find(listings):
    lonely = np.array([0])
    with pytest.raises(ValueError, match="1 queries, of which 1 have no other listing"):
        oracle(evidence(listings), np.arange(len(listings)), lonely)


def test_oracle_needs_queries(listings):
    with pytest.raises(ValueError, match="0 queries"):
        oracle(evidence(listings), np.arange(len(listings)), np.array([], np.int64))


# where the facts stand


def words_in(text):
    return set(re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower()))


def test_text_says_only_the_facts_of_the_text(listings):
    elsewhere = [
        *HUES,
        *PATTERNS,
        *(use for product_type in PRODUCT_TYPES for use in product_type.uses),
    ]
    english = {word for words in elsewhere for word in (words.word, words.synonym)}
    brands = {brand_name(k, u, b).lower() for k in range(4) for u in range(3) for b in range(5)}
    for listing in listings:
        text = f"{listing.text.title} {listing.text.description}"
        assert not words_in(text) & (english | brands), text
        assert not any(words.chinese in text for words in elsewhere), text


def test_attributes_say_only_the_facts_of_the_attributes(listings):
    elsewhere = {
        word for words in [*HUES, *PATTERNS, *MATERIALS.values(), *SIZES] for word in words[:2]
    }
    for listing in listings:
        assert not words_in(" ".join([*listing.category, *listing.features])) & elsewhere


def test_listing_mentions_exactly_the_facts_it_shows(listings):
    for listing in listings:
        text = f"{listing.text.title} {listing.text.description}".lower()
        words = listing.true_product.words()
        mentioned = {
            fact
            for fact in ("type", "material", "size")
            if any(word in text for word in words[fact])
        }
        assert mentioned == listing.text.shown


def test_listings_of_a_thing_share_its_facts_and_differ_in_seller_and_price(listings):
    groups = {}
    for listing in listings:
        groups.setdefault(listing.group, []).append(listing)
    several = [group for group in groups.values() if len(group) > 1]
    assert len(several) > 0.8 * len(groups)
    for group in several:
        assert len({listing.true_product for listing in group}) == 1
        assert len({listing.seller for listing in group}) == len(group)
        prices = [listing.price for listing in group if listing.price is not None]
        assert len(set(prices)) == len(prices)


def test_variants_of_a_family_can_be_told_apart(listings):
    families = {}
    for listing in listings:
        families.setdefault(listing.true_product.family, set()).add(listing.true_product)
    for things in families.values():
        styles = {(t.product_type, t.shape, t.material, t.use, t.brand) for t in things}
        assert len(styles) == 1
        assert len({(t.colorway, t.size) for t in things}) == len(things)


def test_fields_are_missing_at_realistic_rates(listings):
    shares = {
        "picture": np.mean([not listing.pictures for listing in listings]),
        "description": np.mean([not listing.text.description for listing in listings]),
        "brand": np.mean([listing.brand is None for listing in listings]),
        "price": np.mean([listing.price is None for listing in listings]),
    }
    assert all(0.02 < share < 0.16 for share in shares.values()), shares


def test_brands_have_a_long_tail(listings):
    counts = {}
    for listing in listings:
        if listing.brand is not None:
            counts[listing.brand] = counts.get(listing.brand, 0) + 1
    ranked = sorted(counts.values(), reverse=True)
    assert len(ranked) > 40
    assert sum(ranked[:12]) > 0.5 * sum(ranked) > 10 * sum(ranked[-12:])


def test_evidence_matches_the_listing(listings):
    seen = evidence(listings)
    for position, listing in enumerate(listings[:200]):
        assert (seen["image"].codes["shape"][position] == UNKNOWN) == (not listing.pictures)
        assert (seen["text"].codes["size"][position] == UNKNOWN) == (
            "size" not in listing.text.shown
        )
        assert (seen["attribute"].codes["brand"][position] == UNKNOWN) == (listing.brand is None)
        assert np.isnan(seen["attribute"].price[position]) == (listing.price is None)
        assert (
            seen["text"].codes["use"][position]
            == seen["image"].codes["material"][position]
            == UNKNOWN
        )


# pictures


def test_every_look_can_be_drawn():
    assert {shape for product_type in PRODUCT_TYPES for shape in product_type.shapes} == set(
        SILHOUETTES
    )
    assert {words.word for words in HUES} == set(COLORS)
    assert {words.word for words in PATTERNS} == set(TEXTURES)
    assert {use.word for product_type in PRODUCT_TYPES for use in product_type.uses} == set(
        FEATURES
    )


def test_colorways_of_a_shape_differ_in_hue_and_use_all_hues_and_patterns():
    looks = [
        [colorway(k, s, c) for c in range(CHOICES)]
        for k in range(len(PRODUCT_TYPES))
        for s in range(CHOICES)
    ]
    assert all(len({hue for hue, _ in look}) == CHOICES for look in looks)
    assert {hue for look in looks for hue, _ in look} == set(range(len(HUES)))
    assert {pattern for look in looks for _, pattern in look} == set(range(len(PATTERNS)))


def test_looks_are_recognized_by_their_mean_pictures():
    rng = np.random.default_rng(0)
    looks = [
        (k, s, c) for k in range(len(PRODUCT_TYPES)) for s in range(CHOICES) for c in range(CHOICES)
    ]
    pictures = np.array([[pixels(look, rng) for _ in range(9)] for look in looks])  # (36, 9, F)
    means = pictures[:, :6].mean(1)
    new = pictures[:, 6:].reshape(-1, means.shape[1])
    nearest = ((new[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == np.repeat(np.arange(len(looks)), 3)).mean() > 0.75  # by chance: 0.03


def pixels(look, rng):
    product_type, shape, code = look
    hue, pattern = colorway(product_type, shape, code)
    data = photograph(
        PRODUCT_TYPES[product_type].shapes[shape],
        HUES[hue].word,
        PATTERNS[pattern].word,
        size=48,
        rng=rng,
    )
    picture = Image.open(io.BytesIO(data))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (48, 48))
    return np.asarray(picture.resize((16, 16), Image.Resampling.BOX), float).ravel()


def test_photographs_of_one_look_differ_and_repeat_by_seed():
    def photo(seed, second=False):
        return photograph(
            "tote", "red", "dotted", size=32, rng=np.random.default_rng(seed), second=second
        )

    assert photo(1) == photo(1)
    assert len({photo(1), photo(2), photo(1, second=True)}) == 3


# queries


def test_grades_of_a_text_query_by_hand():
    true, false = np.array([True, False])
    asked = {
        "type": np.array([true, true, true, true, false]),
        "hue": np.array([true, false, false, false, true]),
        "material": np.array([true, true, false, false, true]),
        "size": np.array([true, true, true, false, true]),
        "use": np.array([true, true, true, true, true]),
        "pattern": np.array([true, true, true, true, true]),
    }
    assert text_grades(asked).tolist() == [3, 2, 1, 0, 0]
    assert text_grades({name: asked[name] for name in ("type", "hue", "material")}).tolist() == [
        3,
        0,
        0,
        0,
        0,
    ]


def test_no_text_query_has_the_answers_of_another_one(listings, queries):
    texts = [query for query in queries if query.type == "text"]
    assert (
        len(texts) == len({(query.grades == 3).tobytes() for query in texts}) == len(listings) // 6
    )
    assert {query.split for query in texts} == {"train", "val", "test"}
    for query in texts:
        assert query.grades[query.source] == 3
        assert query.split == listings[query.source].true_product.split


def test_some_text_queries_are_chinese_and_name_hues(queries):
    texts = [query.text for query in queries if query.type == "text"]
    chinese = [text for text in texts if any(words.chinese in text for words in HUES)]
    english = [
        text for text in texts if words_in(text) & {word for words in HUES for word in words[:2]}
    ]
    assert len(chinese) > 5 and len(english) > 50


def test_product_query_is_answered_by_the_other_sellers_and_excludes_its_source(listings, queries):
    products = [query for query in queries if query.type == "product"]
    assert {query.split for query in products} == {"val", "test"}
    for query in products:
        group = listings[query.source].group
        others = {i for i, listing in enumerate(listings) if listing.group == group} - {
            query.source
        }
        assert set(np.flatnonzero(query.grades == 3)) == others
        assert others
        families = {listings[i].true_product.family for i in np.flatnonzero(query.grades == 2)}
        assert families <= {listings[query.source].true_product.family}
        assert listings[query.source].pictures


def test_photo_query_is_answered_by_what_looks_the_same(listings, queries):
    photos = [query for query in queries if query.type == "image"]
    assert photos
    for query in photos:
        asked = listings[query.source].true_product
        for i in np.flatnonzero(query.grades):
            true_product = listings[i].true_product
            assert (true_product.product_type, true_product.shape) == (
                asked.product_type,
                asked.shape,
            )
            assert (query.grades[i] == 3) == (true_product.colorway == asked.colorway)


# the files


def test_files_fit_together(raw):
    products, queries, qrels = (
        read(raw / f"{name}.csv") for name in ("products", "queries", "qrels")
    )
    ids = {row["id"] for row in products}
    assert len(products) == len(ids) == 300
    assert tuple(products[0]) == PRODUCT_COLUMNS
    asked = {row["query_id"]: row for row in queries}
    assert {row["query_id"] for row in qrels} == set(asked)
    assert {row["product_id"] for row in qrels} <= ids
    assert {row["relevance"] for row in qrels} == {"1", "2", "3"}
    assert all(row["product_id"] != asked[row["query_id"]]["source_product_id"] for row in qrels)
    named = {row["image"] for row in [*products, *queries] if row["image"]}
    named |= {name for row in products for name in row["extra_images"].split("|") if name}
    assert {str(path.relative_to(raw)) for path in (raw / "images").iterdir()} == named
    assert Image.open(raw / min(named)).size == (32, 32)
    assert all(len(row["category"].split(" > ")) == 3 for row in products)
    assert any(
        json.loads(row["attributes"])["features"].count("|")
        for row in products
        if row["attributes"]
    )


def test_groups_and_families_stay_in_one_split(raw):
    products = read(raw / "products.csv")
    for column in ("group_id", "family_id"):
        assert len({row[column] for row in products}) == len(
            {(row[column], row["split"]) for row in products}
        )
    train = np.mean([row["split"] == "train" for row in products])
    assert 0.5 < train < 0.85


def test_every_split_gets_its_share_of_things():
    splits = [listing.true_product.split for listing in draw_listings(3000, seed=0)]
    shares = [splits.count(split) / len(splits) for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_oracle_file_holds_every_subset_and_the_settings(raw):
    report = json.loads((raw / "oracle.json").read_text(encoding="utf-8"))
    assert set(report["recall@10"]) == {
        "text",
        "image",
        "attribute",
        "text+image",
        "text+attribute",
        "image+attribute",
        ALL,
    }
    tests = [
        row
        for row in read(raw / "queries.csv")
        if row["type"] == "product" and row["split"] == "test"
    ]
    assert report["queries"] == len(tests) > 0
    assert report["settings"] == {"products": 300, "seed": 0, "image_size": 32}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_catalogue_is_the_same_for_any_number_of_workers_and_another_for_another_seed(
    raw, tmp_path
):
    write_samples(tmp_path / "workers", products=300, image_size=32, num_workers=2)
    write_samples(tmp_path / "seed", products=300, image_size=32, num_workers=0, seed=1)
    assert contents(tmp_path / "workers") == contents(raw)
    assert contents(tmp_path / "seed")["products.csv"] != contents(raw)["products.csv"]


# the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--products", "99"], "products=99 is too small: at least 100"),
        (["--image-size", "8"], "image_size=8 is too small: at least 16"),
        (["--seed", "-1"], "seed=-1 is too small: at least 0"),
    ],
)
def test_command_refuses_settings_in_one_line(tmp_path, capsys, options, message):
    assert main(["--output", str(tmp_path / "raw"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_command_replaces_only_a_sample_catalogue(raw, tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    options = ["--products", "100", "--image-size", "16", "--num-workers", "1"]
    assert main(["--output", str(tmp_path), *options]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["--output", str(tmp_path), *options, "--overwrite"]) == 1
    assert "is not a sample catalogue" in capsys.readouterr().err
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


def test_command_writes_and_overwrites(tmp_path, capsys):
    options = [
        "--output",
        str(tmp_path / "raw"),
        "--products",
        "100",
        "--image-size",
        "16",
        "--num-workers",
        "1",
    ]
    assert main(options) == 0
    assert ALL in capsys.readouterr().out
    assert main([*options, "--overwrite", "--seed", "5"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert len(read(tmp_path / "raw" / "products.csv")) == 100


def test_command_knows_no_abbreviations(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "raw"), "--prod", "100"])
    assert stop.value.code == 2
    assert "--prod" in capsys.readouterr().err


def test_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("tritower.datamodules.samples.draw_pictures", fail)
    with pytest.raises(OSError, match="disk full"):
        write_samples(tmp_path / "raw", products=100, image_size=16, num_workers=1)
    assert not list(tmp_path.iterdir())
