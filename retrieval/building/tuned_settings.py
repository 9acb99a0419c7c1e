"""Search settings of a finished index, measured with all vectors as the truth."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from tritower.retrieval.building.training_sample import (
    batches_with_progress,
    read_rows,
    sample_rows,
)
from tritower.retrieval.building.tuning.measure import measure, missed_targets
from tritower.retrieval.building.tuning.tuning_queries import (
    PER_TYPE,
    PER_TYPE_BY_DEFAULT,
    draw_queries,
    find_neighbors,
    product_queries,
)
from tritower.retrieval.ivf.engine import Engine
from tritower.retrieval.ivf.operating_points import Target, Tuning
from tritower.retrieval.vectors.embeddings import EmbeddingReader

logger = logging.getLogger(__name__)


def tuned_settings(
    reader: EmbeddingReader,
    engine: Engine,
    target: Target,
    queries: EmbeddingReader | None,
    seed: int,
    sample: int,
) -> dict[str, Any]:
    """Content of settings.json: default settings and operating points.

    Args:
        reader: all vectors.
        engine: the finished index.
        target: what to reach.
        queries: real queries; products as queries are always measured, too.
        seed: draws the queries.
        sample: size of the training sample, of which products are drawn as queries.

    Raises:
        ValueError: the index misses the target, and the target is strict.
    """
    tuning = _measure_index(reader, engine, target, queries, seed, sample)
    # A strict target refuses the index; the default index is published with its best settings.
    problems = missed_targets(tuning, target)
    if problems and target.strict:
        raise ValueError(
            f"the index does not reach recall@{target.k} of {target.recall:g} "
            f"({'; '.join(problems)}) and is not published: ask for less, or allow more memory or "
            "latency"
        )
    for problem in problems:
        logger.warning(
            "the default index does not reach recall@%d of %g for queries of type %s: they are "
            "searched with its best settings. Build with --factory Flat for exact search, or "
            "--recall %g for finer codes",
            target.k,
            target.recall,
            problem,
            target.recall,
        )
    settings = tuning.nearest_settings(target.recall)
    return {**settings._asdict(), "tuning": tuning.to_json()}


def _measure_index(
    reader: EmbeddingReader,
    engine: Engine,
    target: Target,
    queries: EmbeddingReader | None,
    seed: int,
    sample: int,
) -> Tuning:
    """The operating points of a finished index."""
    per_type = PER_TYPE if target.strict else PER_TYPE_BY_DEFAULT
    rows = sample_rows(reader.count, sample, seed)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:per_type])
    tuning_queries = [product_queries(read_rows(reader, rows), rows, reader.metric)]
    if queries is not None:
        tuning_queries += draw_queries(queries, seed, per_type)
    batches = batches_with_progress(reader, "exact search to measure by")
    blocks = (batch.vectors for batch in batches)
    return measure(engine, find_neighbors(tuning_queries, blocks, target.k), target)
