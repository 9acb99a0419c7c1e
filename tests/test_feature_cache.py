"""Features of frozen towers, kept on disk: the same numbers, made once."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.catalogues import write_catalogue
from tests.support.encoders import ITEMS
from tests.support.tiny_models import TIMM, TIMM_ARGS, write_bert, write_open_clip
from tests.support.training import diary, entries, fit
from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.datamodules.preprocess import Preprocess, stable_hash
from tritower.towers import feature_cache as cache_module
from tritower.towers.encoder import Encoder
from tritower.towers.feature_cache import (
    CacheOptions,
    FeatureCache,
    cached,
    fingerprint,
    text_views,
)
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.image import PictureOptions, TimmImage
from tritower.towers.open_clip_models import OpenClipImage
from tritower.towers.text import BiLSTM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def encoder(bert: Path) -> Encoder:
    """Frozen text and image towers."""
    encoder = Encoder(
        8,
        HuggingFaceText(str(bert), query_prefix="query: ", product_prefix="passage: ", freeze=True),
        TimmImage(
            TIMM,
            model_args=TIMM_ARGS,
            freeze=True,
            pictures=PictureOptions(image_size=32, augment=True),
        ),
    )
    return encoder.eval()


def with_cache(
    encoder: Encoder, folder: Path, items: list[Item] = ITEMS, every_view: bool = True
) -> Preprocess:
    own = Preprocess(encoder.preprocess("query"), encoder.preprocess("product"))
    return cached(
        own,
        encoder,
        encoder,
        lambda: iter(items),
        folder,
        CacheOptions(every_view, CPU, batch_size=2),
    )


def test_cached_embeddings_are_the_same(encoder: Encoder, tmp_path: Path) -> None:
    preprocess = with_cache(encoder, tmp_path)
    items = [*ITEMS, Item(attributes={"brand": "x"})]
    for side in ("query", "product"):
        own, looked_up = encoder.preprocess(side)(items), getattr(preprocess, side)(items)
        assert looked_up.text.is_floating_point() and looked_up.image.ndim == 2
        assert torch.equal(looked_up.present, own.present)
        with torch.inference_mode():
            torch.testing.assert_close(
                encoder(looked_up).embedding, encoder(own).embedding, atol=1e-6, rtol=0
            )


def test_every_view_of_a_text_is_there_on_both_sides(encoder: Encoder, tmp_path: Path) -> None:
    preprocess = with_cache(encoder, tmp_path)
    title, description = ({name: text} for name, text in ITEMS[0].text.items())
    views = [Item(title), Item(description), Item(ITEMS[0].text)]
    for side in ("query", "product"):
        assert getattr(preprocess, side)(views).text.abs().sum(1).min() > 0


def test_without_field_dropout_whole_texts_and_titles_are_there(
    encoder: Encoder, tmp_path: Path
) -> None:
    preprocess = with_cache(encoder, tmp_path, every_view=False)
    title, description = ({name: text} for name, text in ITEMS[0].text.items())
    assert preprocess.query([Item(title), Item(ITEMS[0].text)]).text.shape[0] == 2
    with pytest.raises(KeyError, match="has nothing for 'query: A mug"):
        preprocess.query([Item(description)])


def test_what_was_never_added_is_named(encoder: Encoder, tmp_path: Path) -> None:
    preprocess = with_cache(encoder, tmp_path)
    with pytest.raises(
        KeyError, match=r"feature cache .*text-.* has nothing for 'passage: never seen'"
    ):
        preprocess.product([Item({"title": "never seen"})])


def files(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*.npy"))
    }


def test_a_second_time_nothing_is_made(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cache(encoder, tmp_path)
    before = files(tmp_path)
    assert before
    for tower in encoder.towers.values():
        monkeypatch.setattr(
            type(tower), "forward", lambda *_: pytest.fail("a frozen tower ran again")
        )
    with_cache(encoder, tmp_path)
    assert files(tmp_path) == before


def test_new_items_are_added_and_old_ones_kept(encoder: Encoder, tmp_path: Path) -> None:
    with_cache(encoder, tmp_path, ITEMS[:2])
    before = files(tmp_path)
    preprocess = with_cache(encoder, tmp_path)
    after = files(tmp_path)
    assert before.items() < after.items()
    preprocess.product(ITEMS)


def test_changed_weights_or_preprocessing_are_another_cache(
    encoder: Encoder, bert: Path, tmp_path: Path
) -> None:
    tower = encoder.towers["text"]
    names = {fingerprint(tower)}
    next(tower.parameters()).data[0, 0] += 1e-3
    names.add(fingerprint(tower))
    names.add(fingerprint(HuggingFaceText(str(bert), pooling="cls")))
    names.add(fingerprint(HuggingFaceText(str(bert), max_length=7)))
    assert len(names) == 4
    image = encoder.towers["image"]
    names = {fingerprint(image)}
    for settings in ({"resize": "crop"}, {"mean": [0.5, 0.5, 0.4]}, {"interpolation": "nearest"}):
        other = TimmImage(
            TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(image_size=32, **settings)
        )
        other.load_state_dict(image.state_dict())
        names.add(fingerprint(other))
    assert len(names) == 4


def test_the_preprocessing_of_open_clip_is_part_of_its_name(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "clip")
    one = OpenClipImage(f"local-dir:{folder}")
    config = folder / "open_clip_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace("squash", "longest"), encoding="utf-8"
    )
    other = OpenClipImage(f"local-dir:{folder}")
    assert one.preprocess.resize != other.preprocess.resize
    assert fingerprint(one) != fingerprint(other)


def test_a_part_without_its_digests_does_not_exist(encoder: Encoder, tmp_path: Path) -> None:
    """As a process leaves it that is killed while it writes."""
    with_cache(encoder, tmp_path)
    for digests in tmp_path.rglob("digests-*.npy"):
        digests.unlink()
    preprocess = with_cache(encoder, tmp_path)
    with torch.inference_mode():
        own, looked_up = (
            encoder(p(ITEMS)).embedding for p in (encoder.preprocess("product"), preprocess.product)
        )
    torch.testing.assert_close(looked_up, own, atol=1e-6, rtol=0)


def test_only_frozen_towers_are_cached(bert: Path, tmp_path: Path) -> None:
    encoder = Encoder(
        8,
        HuggingFaceText(str(bert)),
        TimmImage(TIMM, model_args=TIMM_ARGS, freeze=True, pictures=PictureOptions(image_size=32)),
    )
    items = with_cache(encoder, tmp_path).product(ITEMS)
    assert not items.text.is_floating_point() and items.image.ndim == 2
    assert not list(tmp_path.glob("text-*"))
    with_cache(Encoder(8, BiLSTM()), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_two_encoders_have_a_cache_each(encoder: Encoder, bert: Path, tmp_path: Path) -> None:
    query = Encoder(8, HuggingFaceText(str(bert), pooling="cls", freeze=True)).eval()
    own = Preprocess(query.preprocess("query"), encoder.preprocess("product"))
    options = CacheOptions(every_view=False, device=CPU)
    preprocess = cached(own, query, encoder, lambda: ITEMS, tmp_path, options)
    for side, one in (("query", query), ("product", encoder)):
        with torch.inference_mode():
            looked_up, plain = (
                one(getattr(preprocess, side)(ITEMS)),
                one(one.preprocess(side)(ITEMS)),
            )
        torch.testing.assert_close(looked_up.embedding, plain.embedding, atol=1e-6, rtol=0)
    assert len(list(tmp_path.glob("text-*"))) == 2


def test_parts_are_found_by_digest(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    assert cache.positions(np.array([5])).tolist() == [-1]
    contents = [f"text {i}" for i in range(10)]
    digests = np.array([stable_hash(text) for text in contents])
    features = np.arange(30, dtype=np.float32).reshape(10, 3)
    for some in (slice(0, 4), slice(4, 9)):
        cache.add(digests[some], features[some])
    order = [8, 0, 4, 3]
    assert np.array_equal(cache.features([contents[i] for i in order]), features[order])
    assert cache.features(["", contents[0]]).tolist() == [[0.0] * 3, [0.0, 1.0, 2.0]]
    assert cache.positions(digests)[9] == -1
    copy = pickle.loads(pickle.dumps(cache))
    assert np.array_equal(copy.features([contents[5]]), features[5:6])


def test_runs_that_fill_one_cache_at_a_time_keep_their_features_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adds a part while the other is between the two files of its own."""
    one, other = FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "cache")
    write, between = (
        cache_module.write_bytes,
        [lambda: other.add(np.array([stable_hash("b")]), np.array([[2.0]]))],
    )

    def interrupted(path: Path, data: bytes) -> None:
        write(path, data)
        if between:
            between.pop()()

    monkeypatch.setattr(cache_module, "write_bytes", interrupted)
    one.add(np.array([stable_hash("a")]), np.array([[1.0]]))
    assert FeatureCache(tmp_path / "cache").features(["a", "b"]).tolist() == [[1.0], [2.0]]


def test_too_many_text_fields_are_refused(encoder: Encoder) -> None:
    item = Item({f"field{i}": "x" for i in range(5)})
    with pytest.raises(ValueError, match=r"5 text fields: their 31 views .*views\.field_dropout"):
        text_views(item, encoder.preprocess("query"), every_view=True)


# ---------------------------------------------------------------- whole trainings


def frozen(bert: Path, weights: Path) -> list[str]:
    """Arguments of a training whose text and image towers are frozen."""
    return [
        "--model.product.text=HuggingFaceText",
        f"--model.product.text.pretrained={bert}",
        "--model.product.text.freeze=true",
        "--model.product.image.init_args.freeze=true",
        f"--model.product.image.init_args.pretrained={weights}",
        "--model.product.attribute.init_args.dropout=0",
        "--trainer.max_epochs=1",
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_models import write_timm

    path = tmp_path_factory.mktemp("weights") / "timm.safetensors"
    write_timm(path)
    return path


def test_training_with_a_cache_equals_training_without(
    tiny_catalogue: Path, bert: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = frozen(bert, weights)
    cache = f"--model.encoding.feature_cache={tmp_path / 'features'}"
    assert (
        fit(tiny_catalogue, tmp_path / "plain", *arguments, *diary(tmp_path / "plain.jsonl")) == 0
    )
    assert (
        fit(tiny_catalogue, tmp_path / "first", *arguments, cache, *diary(tmp_path / "first.jsonl"))
        == 0
    )
    made = files(tmp_path / "features")
    monkeypatch.setattr(HuggingFaceText, "forward", lambda *_: pytest.fail("the frozen tower ran"))
    monkeypatch.setattr(TimmImage, "forward", lambda *_: pytest.fail("the frozen tower ran"))
    assert (
        fit(tiny_catalogue, tmp_path / "again", *arguments, cache, *diary(tmp_path / "again.jsonl"))
        == 0
    )
    assert files(tmp_path / "features") == made
    plain, first, again = (
        [float.fromhex(entry["loss"]) for entry in entries(tmp_path / f"{name}.jsonl")]
        for name in ("plain", "first", "again")
    )
    assert len(plain) == 5
    assert first == pytest.approx(plain, abs=1e-5)
    assert again == first


def test_titles_as_queries_are_in_the_cache_too(bert: Path, weights: Path, tmp_path: Path) -> None:
    """Without judgements and mates, held-out queries show their titles alone."""
    catalogue = write_catalogue(tmp_path / "C", num_groups=20, queries=False)
    cache = f"--model.encoding.feature_cache={tmp_path / 'features'}"
    arguments = [
        *frozen(bert, weights),
        cache,
        "--data.examples.positives=none",
        "--data.views.field_dropout=0",
    ]
    assert fit(catalogue, tmp_path / "run", *arguments) == 0


def test_items_of_a_catalogue_are_cached_once_each(
    tiny_catalogue: Path, encoder: Encoder, tmp_path: Path
) -> None:
    table = Table(tiny_catalogue / "products")
    items = [product_item(table.row(row)) for row in range(len(table))]
    with_cache(encoder, tmp_path, items)
    digests = np.load(
        next(
            (tmp_path / next(p for p in os.listdir(tmp_path) if p.startswith("image"))).glob("dig*")
        )
    )
    assert (
        len(digests)
        == len(set(digests))
        == len({picture for item in items for picture in item.images})
    )
