"""A frozen tower runs once: its features, kept on disk by the content they were made of.

Where a cache is in use, preprocessing puts features in place of tokens and pixels (see
`tritower.datamodules.batch.Items`), so pictures are not even decoded again. A cache belongs to one
tower with its weights and preprocessing.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tritower.artefacts.storage import write_bytes
from tritower.datamodules.batch import Item, Side
from tritower.datamodules.preprocess import ItemPreprocess, Preprocess, stable_hash
from tritower.terminal.progress import progress_bar
from tritower.towers.encoder import Encoder, features_of
from tritower.towers.image import ImageTower
from tritower.towers.text import TextPreprocess, TextTower
from tritower.towers.tower import Tower

logger = logging.getLogger(__name__)

Content = TypeVar("Content", str, bytes)

CONTENTS_PER_PART = 4_096
MAX_TEXT_FIELDS = 4
NOT_OF_CONTENT = ("template", "query_prefix", "product_prefix", "augment", "pictures")
"""Constructor arguments of towers that do not change the features of a content."""


class FeatureCache:
    """Features by content: parts of features (n, F) float32 and digests (n,) int64 in a folder.

    Features are memory-mapped; digests stay in memory. Picklable: files are opened where they are
    used.

    Args:
        folder: made when something is added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[np.ndarray] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_parts": None}

    def _open(self) -> None:
        numbers = sorted(
            path.stem.removeprefix("digests-") for path in self.folder.glob("digests-*.npy")
        )
        self._parts = [
            np.load(self.folder / f"features-{number}.npy", mmap_mode="r") for number in numbers
        ]
        digests = [np.load(self.folder / f"digests-{number}.npy") for number in numbers]
        digest = np.concatenate([np.empty(0, np.int64), *digests])
        self._order = np.argsort(digest, kind="stable")
        self._digests = digest[self._order]
        self._starts = np.cumsum([0, *map(len, digests)])

    def positions(self, digests: np.ndarray) -> np.ndarray:
        """(n,) int64 -> (n,) int64 position of the features, -1 where there are none."""
        if self._parts is None:
            self._open()
        if not len(self._digests):
            return np.full(len(digests), -1)
        where = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        return np.where(self._digests[where] == digests, self._order[where], -1)

    def features(self, contents: Sequence[str] | Sequence[bytes]) -> Tensor:
        """(n, F) float32; zeros for an empty text.

        Raises:
            KeyError: a content that was never added.
        """
        positions = self.positions(
            np.array([stable_hash(content) for content in contents], np.int64)
        )
        assert self._parts is not None
        result = np.zeros(
            (len(contents), self._parts[0].shape[1] if self._parts else 0), np.float32
        )
        # Empty contents have no features: they are zeros.
        for i, position in enumerate(positions):
            if position >= 0:
                part = int(np.searchsorted(self._starts, position, side="right")) - 1
                result[i] = self._parts[part][position - self._starts[part]]
            elif contents[i]:
                raise KeyError(
                    f"The feature cache {self.folder} has nothing for {contents[i][:60]!r}."
                )
        return torch.from_numpy(result)

    def add(self, digests: np.ndarray, features: np.ndarray) -> None:
        """Add (N,) digests with (N, F) features; digests come last and make the addition valid."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = uuid.uuid4().hex  # two runs may fill one cache
        for name, array in (
            ("features", features.astype(np.float32)),
            ("digests", digests.astype(np.int64)),
        ):
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            write_bytes(self.folder / f"{name}-{number}.npy", buffer.getvalue())
        self._parts = None


@dataclass(frozen=True)
class CachedText:
    """A text tower's preprocessing that looks features up."""

    inner: TextPreprocess
    cache: FeatureCache

    def render(self, item: Item, side: Side) -> str:
        """As the tower's own."""
        return self.inner.render(item, side)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, F) float32."""
        return self.cache.features(texts)


@dataclass(frozen=True)
class CachedImage:
    """An image tower's preprocessing that looks features up; pictures are not varied."""

    cache: FeatureCache

    def __call__(
        self, images: Sequence[bytes], rngs: Sequence[np.random.Generator] | None = None
    ) -> Tensor:
        """(N, F) float32."""
        return self.cache.features(images)


def fingerprint(tower: Tower) -> str:
    """Of a tower's class, architecture, pixels and weights.

    What its features depend on beside the content.
    """
    architecture = {
        name: value for name, value in tower.architecture().items() if name not in NOT_OF_CONTENT
    }
    if isinstance(tower, ImageTower):
        pixels = asdict(replace(tower.preprocess, augment=False))
    else:
        pixels = {}
    about = [type(tower).__name__, architecture, pixels]
    # Buffers count, too: the mean and the deviation of pixels are among them.
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    # Mean and deviation of pixels are among the buffers.
    for name, tensor in sorted([*tower.named_parameters(), *tower.named_buffers()]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def text_views(item: Item, preprocess: ItemPreprocess, every_view: bool) -> set[str]:
    """The possible texts of an item.

    Of all its fields and of its title, or with `every_view` of any of them.
    """
    fields = list(item.text.items())
    if every_view and len(fields) > MAX_TEXT_FIELDS:
        raise ValueError(
            f"A product has {len(fields)} text fields: their {2 ** len(fields) - 1} views are too "
            "many to cache. "
            "Set views.field_dropout to 0, or name fewer text fields when preparing the catalogue."
        )
    # All fields, the title alone, and every subset that training may draw.
    sizes = range(1, len(fields) + 1) if every_view else ()
    views = [
        dict(fields),
        dict(fields[:1]),
        *(dict(some) for size in sizes for some in combinations(fields, size)),
    ]
    assert preprocess.text is not None
    return {
        text for view in views if (text := preprocess.text.render(Item(text=view), preprocess.side))
    }


@dataclass(frozen=True)
class CacheOptions:
    """How missing features are computed.

    Attributes:
        every_view: texts may lose fields in training, so every combination of fields is computed.
        device: where towers run.
        batch_size: texts or pictures at a time.
        write: compute what is missing; False only looks up.
    """

    every_view: bool
    device: torch.device
    batch_size: int = 64
    write: bool = True


def cached(
    preprocess: Preprocess,
    query: Encoder,
    product: Encoder,
    items: Callable[[], Iterable[Item]],
    folder: Path,
    options: CacheOptions,
) -> Preprocess:
    """Preprocessing that looks up the features of frozen towers, after adding missing ones.

    Args:
        preprocess: of the model.
        query: query encoder.
        product: product encoder; the same one where weights are shared.
        items: returns everything that will be looked up; called once for each frozen tower.
        folder: of all caches.
        options: how missing features are computed.
    """
    sides = {"query": query, "product": product}
    result = {"query": preprocess.query, "product": preprocess.product}
    # Sides that share an encoder share its caches.
    for encoder in {id(e): e for e in sides.values()}.values():
        own = [side for side in sides if sides[side] is encoder]
        for name, tower in encoder.named_towers.items():
            if not tower.frozen or not isinstance(tower, TextTower | ImageTower):
                continue
            cache = FeatureCache(folder / f"{name}-{fingerprint(tower)}")
            if options.write:
                plain = [getattr(preprocess, side) for side in own]
                needed = contents(items(), plain, name, options.every_view)
                fill(cache, tower, needed, options.device, options.batch_size)
            # From now on, preprocessing looks features up in place of tokens and pixels.
            for side in own:
                if isinstance(tower, TextTower):
                    result[side] = replace(result[side], text=CachedText(tower.preprocess, cache))
                else:
                    result[side] = replace(result[side], image=CachedImage(cache))
    return Preprocess(**result)


def contents(
    items: Iterable[Item], sides: Sequence[ItemPreprocess], name: str, every_view: bool
) -> Iterator[str | bytes]:
    """All texts or pictures of the items, some more than once."""
    for item in items:
        if name == "image":
            yield from item.images
        else:
            for side in sides:
                yield from sorted(text_views(item, side, every_view))


@torch.inference_mode()
def fill(
    cache: FeatureCache,
    tower: TextTower | ImageTower,
    contents: Iterable[str | bytes],
    device: torch.device,
    batch_size: int,
) -> None:
    """Run a frozen tower over all contents that the cache lacks."""
    home = next(tower.parameters()).device
    tower.to(device).eval()
    stream = iter(contents)
    added = 0
    with progress_bar(f"caching {cache.folder.name}", None, "features") as advance:
        while part := list(islice(stream, CONTENTS_PER_PART)):
            by_digest = {stable_hash(content): content for content in part}
            digests = np.array(list(by_digest), np.int64)
            missing = digests[cache.positions(digests) < 0].tolist()
            # Texts of one length need no padding.
            missing.sort(key=lambda digest: len(by_digest[digest]))
            features = []
            for start in range(0, len(missing), batch_size):
                batch = [by_digest[digest] for digest in missing[start : start + batch_size]]
                inputs = tower.preprocess(batch).to(device)
                features.append(features_of(tower, inputs).float().cpu().numpy())
                advance(len(batch))
            if missing:
                cache.add(np.array(missing, np.int64), np.concatenate(features))
                added += len(missing)
    tower.to(home)
    logger.info("%s features added to %s", f"{added:,}", cache.folder)
