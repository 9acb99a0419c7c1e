"""An index that lives, against a dict.

Whatever is done to it, it finds what the dict holds, and nothing else.
"""

from __future__ import annotations

import atexit
import gc
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.faults import Watched, using
from tritower.artefacts import files
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.updating.update import UpdateReport, update_index
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 16
SEEDS = st.integers(0, 10**6)
KILLS = st.integers(0, 120).map(lambda number: number or None)
"""The operation before which an update is killed; None = it is not."""


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def vectors(count, seed=0):
    """Unit vectors around twenty centers."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((20, DIM))
    return unit(
        centers[generator.integers(0, 20, count)] + 0.5 * generator.standard_normal((count, DIM))
    )


def embed(folder, rows, ids, contents=None, model="model-a"):
    """An embeddings folder of one shard."""
    writer = EmbeddingWriter(folder, dim=rows.shape[1], model=model)
    writer.write("shard-0", list(ids), rows, contents=contents)
    writer.finish(["shard-0"])
    return EmbeddingReader(folder)


class Killed(BaseException):
    """The process is gone."""


class Killing(Watched):
    """A system on which the process dies before operation `kill_at`, counted from 1.

    Nothing is done any more.
    """

    def __init__(self, kill_at):
        super().__init__()
        self.kill_at = kill_at

    @property
    def tombstone_share(self):
        return len(self.calls) >= self.kill_at

    def before(self, operation, path):
        super().before(operation, path)
        if self.tombstone_share:
            raise Killed

    def close(self, descriptor):
        files.System.close(self, descriptor)  # the kernel does that for the dead


@cache
def start_of(options, count):
    """A built index with its embeddings, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="living-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    reader = embed(folder / "e", vectors(count, seed=1), [f"p{i}" for i in range(count)])
    build_index(reader, folder / "i", options)
    return folder


class LivingIndex(RuleBasedStateMachine):
    """An index whose lists are mapped, searched in all its lists.

    Attributes:
        given: id -> vector as it was given.
        truth: id -> vector as it is read from embeddings.
        rows: id -> row.
        done: changes and kills so far, of all machines.
    """

    done: ClassVar[Counter[str]] = Counter()

    options = BuildOptions("IVF16,PQ8x4fsr,Refine(SQ8)")
    start = 640
    wide: ClassVar[dict[str, Any]] = {"nprobe": 16, "k_factor": 1000.0}

    @initialize()
    def build(self):
        self.folder = Path(tempfile.mkdtemp(prefix="living-"))
        self.root, self.turn = self.folder / "i", 0
        origin = start_of(self.options, self.start)
        shutil.copytree(origin / "i", self.root)
        self.given = dict(
            zip((f"p{i}" for i in range(self.start)), vectors(self.start, seed=1), strict=True)
        )
        self.truth = self.read(EmbeddingReader(origin / "e"))
        self.rows = {product: row for row, product in enumerate(self.truth)}

    def read(self, reader):
        return {
            product: vector
            for batch in reader.batches()
            for product, vector in zip(batch.ids.to_pylist(), batch.vectors, strict=True)
        }

    def change(self, upsert, delete, kill_at=None, compact=False):
        self.turn += 1
        reader = None
        if upsert:
            reader = embed(
                self.folder / f"u{self.turn}", np.stack(list(upsert.values())), list(upsert)
            )
        old = dict(self.truth)
        self.done["changes"] += 1
        if kill_at is not None:
            with suppress(Killed), using(killing := Killing(kill_at)):
                update_index(
                    self.root, upsert=reader, delete=delete, compact=compact, measure=False
                )
            gc.collect()  # its locks go with it
            self.done["kills"] += killing.tombstone_share
            self.served(old, self.after(reader, delete))
        report = update_index(
            self.root, upsert=reader, delete=delete, compact=compact, measure=False
        )
        self.check_report(report, reader, delete, old, killed=kill_at is not None)
        self.truth = self.after(reader, delete)
        self.given |= upsert
        self.follow_rows(old)
        others = [
            path.name for path in self.folder.iterdir() if path.name not in ("i", *self.uploads())
        ]
        assert others == [], "nothing is left beside the index"
        assert all(path.name.isdigit() for path in (self.root / "versions").iterdir())

    def uploads(self):
        return [f"u{turn}" for turn in range(1, self.turn + 1)]

    def after(self, reader, delete):
        """The truth after a change."""
        kept = {product: vector for product, vector in self.truth.items() if product not in delete}
        return kept | ({} if reader is None else self.read(reader))

    def served(self, *truths):
        """What a killed update leaves is one of these as a whole."""
        index = ProductIndex.open(self.root, fall_back=False)
        assert set(index.id_table.column.drop_null().to_pylist()) in [
            set(truth) for truth in truths
        ]

    def check_report(self, report: UpdateReport, reader, delete, old, killed):
        assert report.count == len(self.after(reader, delete))
        given = 0 if reader is None else reader.count
        assert report.given == given == report.added + report.replaced + report.unchanged
        if killed:  # the first run may have published before it died
            return
        assert report.unknown == [product for product in delete if product not in old]
        assert report.deleted == len(delete) - len(report.unknown)
        new = {} if reader is None else self.read(reader)
        assert report.added == len(new.keys() - old.keys())
        assert report.unchanged == sum(
            product in old and np.array_equal(old[product], vector)
            for product, vector in new.items()
        )

    def follow_rows(self, old):
        """What has not changed keeps its row, unless rows were closed up.

        Then all keep their order.
        """
        index = ProductIndex.open(self.root)
        compacted = index.manifest.meta.get("update", {}).get(
            "compacted", False
        )  # maybe by the run that was killed
        now = {
            product: row
            for row, product in enumerate(index.id_table.column.to_pylist())
            if product is not None
        }
        same = [
            product
            for product in self.truth
            if product in old and self.truth[product] is old[product]
        ]
        if not compacted:
            assert all(now[product] == self.rows[product] for product in same)
        by_row = sorted(same, key=self.rows.__getitem__)
        assert sorted(same, key=now.__getitem__) == by_row
        self.rows = now

    @rule(count=st.integers(1, 20), seed=SEEDS, kill_at=KILLS)
    def add(self, count, seed, kill_at):
        self.change(
            {f"n{seed}-{i}": row for i, row in enumerate(vectors(count, seed))}, [], kill_at
        )

    @rule(seed=SEEDS, count=st.integers(1, 20), delete=st.integers(0, 20), kill_at=KILLS)
    def change_and_delete(self, seed, count, delete, kill_at):
        """New vectors for some, the ones they have for others, and some more are gone."""
        chosen = np.random.default_rng(seed).permutation(sorted(self.truth)).tolist()
        new = dict(zip(chosen[:count], vectors(count, seed + 1), strict=False))
        new |= {product: self.given[product] for product in chosen[count : count + 5]}
        self.change(new, chosen[count + 5 : count + 5 + delete], kill_at)

    @rule(seed=SEEDS)
    def add_a_twin(self, seed):
        """Another product with the very same vector."""
        twin = sorted(self.truth)[seed % len(self.truth)]
        self.change({f"{twin}'": self.given[twin]}, [])

    @precondition(lambda self: len(self.truth) > 450)
    @rule(seed=SEEDS, count=st.integers(1, 60), kill_at=KILLS)
    def delete(self, seed, count, kill_at):
        chosen = np.random.default_rng(seed).permutation(sorted(self.truth))[:count].tolist()
        self.change({}, [*chosen, "nobody"], kill_at)

    @rule()
    def delete_and_add_again(self):
        product = sorted(self.truth)[0]
        vector = self.given[product]
        self.change({}, [product])
        self.change({product: vector}, [])

    @rule()
    def compact(self):
        self.change({}, [], compact=True)
        assert len(ProductIndex.open(self.root).id_table.column) == len(self.truth)

    @invariant()
    def finds_what_the_dict_holds(self):
        if not hasattr(self, "truth"):
            return
        index = ProductIndex.open(self.root, fall_back=False)
        assert len(index) == len(self.truth)
        assert index.manifest.meta["count"] == len(self.truth)
        queries = vectors(3, 3)
        hits = index.search(queries, len(index), settings=index.resolve(**self.wide))
        stored = self.stored(index)
        for query, rows, scores in zip(queries, hits.rows, hits.scores, strict=True):
            found = index.ids(rows).tolist()
            assert sorted(found) == sorted(self.truth), "each product once, and no other"
            expected = np.array([stored[product] @ query for product in found])
            np.testing.assert_allclose(scores, expected, atol=1e-5)
            assert (np.diff(scores) <= 0).all()

    def stored(self, index):
        """Id -> vector as the index keeps it.

        What is left of the one that was embedded, bit for bit.
        """
        refine = index.engine.refine
        ids = index.id_table.column.to_pylist()
        kept = refine.reconstruct_n(0, refine.ntotal)
        stored = {
            product: vector
            for product, vector in zip(ids, kept, strict=True)
            if product is not None
        }
        expected = refine.sa_decode(refine.sa_encode(np.stack(list(self.truth.values()))))
        np.testing.assert_array_equal(
            np.stack([stored[product] for product in self.truth]), expected
        )
        return stored

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


class LivingSpilledIndex(LivingIndex):
    """Products stand in two lists."""

    options = BuildOptions("IVF16,PQ8x4fsr,Refine(SQfp16)", spill=True)


class LivingFlatIndex(LivingIndex):
    """An exact index: its ranking is that of comparing with every product."""

    options = BuildOptions("Flat")
    start = 500
    wide: ClassVar[dict[str, Any]] = {}
