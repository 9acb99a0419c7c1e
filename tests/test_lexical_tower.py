"""The tower of words: counts of shared n-grams in a vector of fixed size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tritower.datamodules.batch import Item
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.schema import Schema
from tritower.towers.encoder import Encoder
from tritower.towers.lexical import HashedNgrams
from tritower.towers.text import BiLSTM

DESCRIPTION = Item({"title": "Mug", "description": "A red mug, a RED lid"})


def hashes_of(tower: HashedNgrams, *texts: str) -> torch.Tensor:
    hashes, _ = tower.preprocess([Item({"description": text}) for text in texts], "product")
    if hashes is None:
        return torch.zeros(len(texts), 1, dtype=torch.int64)
    assert isinstance(hashes, torch.Tensor)
    return hashes


def features(tower: HashedNgrams, *texts: str) -> torch.Tensor:
    return tower(hashes_of(tower, *texts))


def test_each_different_ngram_is_hashed_once() -> None:
    tower = HashedNgrams("{description}")
    ngrams = [
        "a",
        "red",
        "mug",
        "lid",
        "a red",
        "red mug",
        "mug a",
        "red lid",
    ]  # "a red" stands there twice
    assert tower.preprocess.render(DESCRIPTION) == "A red mug, a RED lid"
    hashes = hashes_of(tower, "A red mug, a RED lid", "", "mug")
    assert hashes.shape == (3, len(ngrams)) and hashes.dtype == torch.int64
    assert hashes[0].tolist() == sorted(map(stable_hash, ngrams))
    assert hashes[1].tolist() == [0] * 8
    assert hashes[2].tolist() == [stable_hash("mug")] + [0] * 7


def test_the_longest_ngram_and_the_number_of_words_are_limited() -> None:
    def count(**limits: int) -> int:
        return hashes_of(HashedNgrams(**limits), "one two three four").shape[1]

    assert (count(max_ngram=1), count(max_ngram=2), count(max_ngram=3), count(max_ngram=9)) == (
        4,
        7,
        9,
        10,
    )
    assert count(max_length=2) == 3


def test_features_are_signed_counts_of_unit_length() -> None:
    tower = HashedNgrams(out_dim=5, max_ngram=1)
    expected = np.zeros(5)
    for word in ("red", "mug", "lid"):
        expected[(stable_hash(word) >> 1) % 5] += 1 if stable_hash(word) & 1 else -1
    got = features(tower, "red mug lid red")[0]
    torch.testing.assert_close(
        got, torch.tensor(expected / np.linalg.norm(expected), dtype=torch.float32)
    )
    assert features(tower, "").tolist() == [[0] * 5]


def test_the_cosine_is_the_share_of_ngrams_in_common() -> None:
    """Words of two texts: 30 and 30 of which 10 are the same.

    So the cosine is a third, but for collisions.
    """
    words = [f"w{i}" for i in range(50)]
    one, other, third = features(
        HashedNgrams(out_dim=1 << 20, max_ngram=1),
        " ".join(words[:30]),
        " ".join(words[20:]),
        " ".join(words[40:]),
    )
    assert float(one @ other) == pytest.approx(1 / 3, abs=1e-6)
    assert float(one @ third) == 0
    assert float(other @ third) == pytest.approx(10 / math.sqrt(300), abs=1e-6)


def test_collisions_are_noise_around_zero() -> None:
    """500 pairs of texts without a word in common, in 64 places.

    The mean of 500 cosines of deviation 1/8.
    """
    tower = HashedNgrams(out_dim=64, max_ngram=1)
    one = features(tower, *(" ".join(f"a{i}x{j}" for j in range(40)) for i in range(500)))
    other = features(tower, *(" ".join(f"b{i}x{j}" for j in range(40)) for i in range(500)))
    cosines = (one * other).sum(1)
    assert abs(float(cosines.mean())) < 4 / 8 / math.sqrt(500)
    assert 0.1 < float(cosines.std()) < 0.15


def test_a_typed_query_has_no_words_but_its_text() -> None:
    encoder = Encoder(
        8,
        text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4),
        lexical=HashedNgrams("{description}"),
    )
    items = encoder.preprocess("query")(
        [Item({"query": "red mug"}), DESCRIPTION, Item({"title": "Mug"}), Item()]
    )
    text, _, _, words = items.present.T.tolist()
    assert text == [True, True, True, False]
    assert words == [False, True, False, False]


def test_typed_queries_are_read_where_it_is_said_so() -> None:
    encoder = Encoder(8, lexical=HashedNgrams("{description}", typed=True))
    items = encoder.preprocess("query")([Item({"query": "red mug"}), DESCRIPTION])
    assert items.present[:, 3].tolist() == [True, True]
    assert sorted(items.lexical[0].tolist())[-3:] == sorted(
        map(stable_hash, ["red", "mug", "red mug"])
    )
    assert set(items.lexical[0].tolist()) - {0} <= set(items.lexical[1].tolist())


def test_a_product_without_a_description_is_as_if_there_was_no_such_tower() -> None:
    """Its embedding has no part of the words of others in the batch."""
    torch.manual_seed(0)
    encoder = Encoder(
        8,
        text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4),
        lexical=HashedNgrams("{description}"),
    )
    encoder.eval()
    embed = encoder.preprocess("product")
    plain = Item({"title": "lamp"})
    together, alone = encoder(embed([DESCRIPTION, plain])), encoder(embed([plain]))
    torch.testing.assert_close(together.embedding[1], alone.embedding[0])
    assert together.shares[1].tolist() == [1, 0]
    words, there = encoder.view(together, "lexical")
    assert there.tolist() == [True, False]
    assert not torch.equal(words[0], words[1])


def test_a_template_must_name_a_field_of_the_catalogue() -> None:
    with pytest.raises(ValueError, match=r"names no text field of the catalogue, which has title"):
        HashedNgrams("{description}").set_schema(Schema(("title",), False, ()))


@pytest.mark.parametrize("name", ["out_dim", "max_ngram", "max_length"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: choose at least 1"):
        HashedNgrams(**{name: 0})
