"""Build an index of lists with 4-bit codes, memory-mapped: choose, train, encode, write, measure.

A killed build continues where it stopped (`tritower.retrieval.building.workspace`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.building import resources
from tritower.retrieval.building.assemble import write_ivf_pq
from tritower.retrieval.building.candidates import COMPARED_QUERIES, choose
from tritower.retrieval.building.choose_spec import IndexSpec, train_size
from tritower.retrieval.building.faiss_index import make_index
from tritower.retrieval.building.options import BuildOptions, BuildResult
from tritower.retrieval.building.training_sample import (
    check_enough_for_codes,
    check_enough_for_lists,
    read_rows,
    sample_rows,
    sample_size,
)
from tritower.retrieval.building.tuned_settings import tuned_settings
from tritower.retrieval.building.tuning.predict import Predictor, choose_refine
from tritower.retrieval.building.tuning.tuning_queries import (
    PER_TYPE,
    TuningQueries,
    draw_queries,
    product_queries,
)
from tritower.retrieval.building.workspace import BLOCK_ROWS, Workspace
from tritower.retrieval.ivf import gpu
from tritower.retrieval.ivf.clustering import find_centroids
from tritower.retrieval.ivf.encoded import GROUPING_BYTES, Blocks
from tritower.retrieval.ivf.engine import Engine
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers, train
from tritower.retrieval.ivf.operating_points import Target
from tritower.retrieval.ivf.spec import CODEBOOK, IvfPqSpec, parse_ivf_pq
from tritower.retrieval.vectors.embeddings import EmbeddingReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IvfPqBuild:
    """What an index is built from.

    Attributes:
        reader: embeddings of the products.
        output: the place of the index.
        spec: the factory string that was requested, or the default one.
        options: how to build it.
        target: what to reach; None for nothing.
        queries: real queries to choose and measure by.
    """

    reader: EmbeddingReader
    output: Path
    spec: IndexSpec
    options: BuildOptions
    target: Target | None
    queries: EmbeddingReader | None

    @property
    def ivf_pq(self) -> IvfPqSpec:
        """The parsed factory string."""
        parsed = parse_ivf_pq(self.spec.factory)
        assert parsed is not None
        return parsed

    @property
    def compares_candidates(self) -> bool:
        """Whether the index is chosen among candidates; the default one is only tuned."""
        is_strict = self.target is not None and self.target.strict
        return self.options.factory == "auto" and is_strict

    @property
    def size(self) -> int:
        """Number of training vectors."""
        return sample_size(self.reader, self.ivf_pq.lists, self.options)

    def write(self, folder: Path) -> BuildResult:
        """Build the index into the folder of a version."""
        reader = self.reader
        options = self.options
        factory = self.spec.factory
        # Refuses a spec that does not fit the dimension.
        make_index(factory, reader.dim)
        check_enough_for_lists(factory, self.ivf_pq.lists, self.size, options.strict)
        check_enough_for_codes(factory, CODEBOOK, 4, self.ivf_pq.sub_quantizers, self.size)
        self._check_resources(self.ivf_pq, options.spill)
        settings: dict[str, Any] = {}
        if self.target is None:
            settings = options.settings(self.ivf_pq.lists)._asdict()
        with Workspace(
            self.output, reader, self._identity(), options.seed, self.size, options.spill
        ) as work:
            reader.check_unique()
            trained, training = work.trained(self._train)
            blocks = work.encode(reader, trained)
            write_ivf_pq(folder, trained, [(Blocks(blocks), 0)])
            # Open what was written: an index that lost something on its way to the disk is never
            # published.
            meta = {"count": reader.count, "dim": reader.dim, "spill": trained.spill}
            engine = Engine.open(folder, meta)
            if self.target is not None:
                settings = tuned_settings(
                    reader, engine, self.target, self.queries, options.seed, self.size
                )
        return BuildResult(settings, {**training, "spill": trained.spill})

    def _identity(self) -> str:
        """What decides the result beside the vectors: a build of another identity starts anew."""
        if self.target is None:
            return self.spec.factory
        origin = None
        if self.queries is not None:
            origin = self.queries.fingerprint or self.queries.stamp()
        return f"{self.options.factory} for {self.target} by {origin}"

    def _train(self) -> tuple[TrainedQuantizers, dict[str, Any]]:
        """Choose the index if there is a target, and train it.

        Returns:
            The trained quantizers, and what the manifest keeps of the choice and the training.
        """
        seed = self.options.seed
        size = self.size
        spec = self.ivf_pq
        index_spec = self.spec
        sample, held_out = self._samples()
        rows = np.random.default_rng(seed).permutation(size)[:PER_TYPE]
        started = time.perf_counter()
        centroids = find_centroids(sample, spec.lists, seed)
        candidates = None
        if self.compares_candidates:
            assert self.target is not None
            predictor = Predictor(
                sample,
                held_out,
                self._tuning_queries(held_out, rows),
                self.target,
                self.reader.count,
                seed,
                {spec.lists: centroids},
            )
            chosen = choose(predictor)
            spec = chosen.winner.spec
            index_spec = IndexSpec(str(spec), chosen.reason)
            trained = chosen.trained
            candidates = chosen.to_json()
        else:
            if self.options.factory == "auto":
                queries = self._tuning_queries(sample, rows)
                refine = choose_refine(sample, queries, Target().k, self.reader.count)
                spec = replace(spec, refine=refine)
                size_text = f"{spec.refine_size(self.reader.dim)} bytes to re-rank"
                index_spec = IndexSpec(str(spec), f"{index_spec.reason}, {size_text}")
            trained = train(sample, spec, seed, self.options.spill, centroids)

        # The chosen codes or refine vectors may be larger than the default ones.
        self._check_resources(spec, trained.spill)
        seconds = round(time.perf_counter() - started, 1)
        logger.info(
            "trained %s lists on %s vectors in %.1f s", f"{spec.lists:,}", f"{size:,}", seconds
        )
        training = {
            "seed": seed,
            "vectors": size,
            "per_list": round(size / spec.lists, 2),
            "device": "gpu" if gpu.in_use() else "cpu",
            "seconds": seconds,
        }
        manifest: dict[str, Any] = {
            "factory": index_spec.factory,
            "reason": index_spec.reason,
            "training": training,
        }
        if candidates is not None:
            manifest["candidates"] = candidates
        return trained, manifest

    def _samples(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(S, D) vectors to train on, and (S, D) that candidates are compared on.

        These are other vectors, if there are enough: k-means has seen those it was trained on.
        """
        count = self.reader.count
        seed = self.options.seed
        size = self.size
        rows = sample_rows(count, size, seed)
        if self.compares_candidates and 2 * size <= count:
            both = sample_rows(count, 2 * size, seed)
            first = sample_rows(2 * size, size, seed)
            rows = np.concatenate([both[first], np.delete(both, first)])
        vectors = read_rows(self.reader, rows)
        return vectors[:size], vectors[-size:]

    def _tuning_queries(
        self, vectors: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> list[TuningQueries]:
        """Some products as queries, and real queries if there are any, a few of each type."""
        queries = [product_queries(vectors[rows], rows, self.reader.metric)]
        if self.queries is not None:
            queries += draw_queries(self.queries, self.options.seed)
        return [own.first(COMPARED_QUERIES) for own in queries]

    def _check_resources(self, spec: IvfPqSpec, spill: bool) -> None:
        """Refuse what would not fit into memory or on the disk."""
        sample = self.options.train_sample or train_size(self.reader.count, spec.lists)
        num_samples = 1 + self.compares_candidates  # held at a time
        need = resources.predict(
            self.reader.count,
            self.reader.dim,
            spec,
            sample=num_samples * sample,
            spill=spill,
            block=BLOCK_ROWS,
            grouping=GROUPING_BYTES,
        )
        resources.check(need, self.output, self.options.memory)
