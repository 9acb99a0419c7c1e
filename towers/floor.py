"""After training: the model beside search without training, on held-out queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from tritower.datamodules.batch import Item, Side
from tritower.datamodules.catalogue import product_item
from tritower.datamodules.held_out_rows import QueryRows
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.datamodules.products import ProductDataModule
from tritower.retrieval.evaluating.comparison import (
    DEPTH,
    Asked,
    measure,
    search_untrained,
    untrained_report,
)
from tritower.retrieval.evaluating.evaluation_queries import Questions
from tritower.retrieval.evaluating.untrained import Untrained, number_features
from tritower.retrieval.lexical.records import Record, record_of, record_of_kind, typed_record
from tritower.towers.encoding import to_device
from tritower.towers.metric import to_score_space
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers, untrained_features
from tritower.towers.validation import exact_search

ENCODED_AT_ONCE = 256


class Query(NamedTuple):
    """A held-out query in one of the kinds that it can be asked as.

    Attributes:
        number: of the held-out query.
        kind: see `tritower.retrieval.evaluating.evaluation_queries.KINDS`.
        item: what is shown.
    """

    number: int
    kind: str
    item: Item


def floor_report(
    model: TwoTower, data: ProductDataModule, split: str, towers: Mapping[Side, UntrainedTowers]
) -> dict[str, Any]:
    """Hits of a model and of search without training, by exact search on a split.

    Kinds of query of which the model reads nothing are left out.

    Args:
        model: trained.
        data: whose held-out queries of the split are set up.
        split: "val" or "test".
        towers: the pretrained towers of each side before training.

    Returns:
        A report as of `tritower.retrieval.evaluating.evaluate`: queries, tasks (exact alone),
        baselines, differences, chosen.
    """
    held_out = data.held_out[split]
    assert data.preprocess is not None
    model.eval()
    items = [product_item(data.products.row(row)) for row in held_out.candidates.tolist()]
    products = _encode(model, "product", data.preprocess.product, items, towers["product"])
    records, numbers = _records(items, data)
    inputs = Untrained(
        records, products.features | ({"numbers": number_features(numbers)} if numbers.size else {})
    )

    asked = list(_queries(QueryRows(data.products, data.queries, held_out, data.preprocess.query)))
    queries = _encode(
        model, "query", data.preprocess.query, [query.item for query in asked], towers["query"]
    )
    read = queries.embedding.any(axis=1)  # of the others the model reads nothing
    asked = [query for query, is_read in zip(asked, read, strict=True) if is_read]
    features = {name: values[read] for name, values in queries.features.items()}
    embedding = queries.embedding[read]
    number = np.array([query.number for query in asked])
    own = held_out.own[number]
    trained = exact_search(embedding, products.embedding, own, k=DEPTH)
    questions = Questions(
        ids=np.array([str(query.number) for query in asked], object),
        kinds=np.array([query.kind for query in asked], object),
        vectors=embedding,
        source=own,
        relevant=held_out.relevant[number],
        judged=held_out.judged[number],
        grades=np.where(held_out.judged[number] >= 0, held_out.grade[number], 0.0).astype(
            np.float64
        ),
        threshold=held_out.threshold,
    )
    shown = _shown(asked, own, inputs, features)
    found = search_untrained(inputs, Asked(questions, shown, trained), None)
    exact = {}
    for kind in questions.all_kinds:
        positions = questions.of_kind(kind)
        part = questions.take(positions)
        exact[kind] = measure(trained[positions], part.relevant, part.judged, part.grades)
    return {
        "queries": {kind: {"count": len(questions.of_kind(kind))} for kind in questions.all_kinds},
        "asked": held_out.kind,
        "split": split,
        "tasks": {"exact": exact},
        **untrained_report(questions, found, {"exact": trained}),
    }


class _Encoded(NamedTuple):
    embedding: np.ndarray  # (n, D) float32, zeros where the model reads nothing of an item
    features: dict[str, np.ndarray]  # name of a tower -> (n, F)


@torch.inference_mode()
def _encode(
    model: TwoTower,
    side: Side,
    preprocess: ItemPreprocess,
    items: Sequence[Item],
    towers: UntrainedTowers,
) -> _Encoded:
    """Embeddings of items, and features of pretrained towers before training."""
    encoder = model.query if side == "query" else model.product
    for tower in towers.values():
        tower.to(model.device).eval()
    embeddings = [np.zeros((0, model.embed_dim), np.float32)]
    features: dict[str, list[np.ndarray]] = {name: [] for name in towers}
    stream = iter(items)
    while batch := list(islice(stream, ENCODED_AT_ONCE)):
        tensors = to_device(preprocess(batch), model.device)
        tensors, untrained = untrained_features(encoder, towers, tensors)
        encoded = encoder(tensors)
        vectors = to_score_space(
            encoded.embedding.float(), side, model.metric
        ) * encoded.present.any(1, keepdim=True)
        embeddings.append(vectors.cpu().numpy())
        for name, found in untrained.items():
            features[name].append(found.cpu().numpy())
    return _Encoded(
        np.concatenate(embeddings),
        {name: np.concatenate(parts) for name, parts in features.items() if parts},
    )


def _records(items: Sequence[Item], data: ProductDataModule) -> tuple[list[Record], np.ndarray]:
    """Records for lexical search, and (n, A) numbers, NaN where missing."""
    title = data.schema.text[0] if data.schema.text else ""
    names = [attribute.name for attribute in data.schema.numbers]
    records = [record_of(item.text, item.attributes, title) for item in items]
    numbers = [[item.attributes.get(name, np.nan) for name in names] for item in items]
    return records, np.array(numbers, np.float64).reshape(len(items), len(names))


def _queries(rows: QueryRows) -> Iterator[Query]:
    """Every held-out query in each kind that it can be asked as.

    What no part of an item shows is left out.
    """
    for number in range(len(rows.held_out)):
        item = rows.item(number)
        if rows.held_out.own[number] < 0:
            if item.text and item.images:
                kind = "fused"
            elif item.images:
                kind = "image"
            else:
                kind = "text"
            yield Query(number, kind, item)
            continue
        yield Query(number, "fused", item)
        parts = {
            "product:text": Item(text=item.text),
            "product:image": Item(images=item.images),
            "product:attribute": Item(attributes=item.attributes),
        }
        yield from (Query(number, kind, part) for kind, part in parts.items() if any(part))


def _shown(
    asked: Sequence[Query], own: np.ndarray, products: Untrained, features: Mapping[str, np.ndarray]
) -> Untrained:
    """What search without training reads of the queries."""
    records: list[Record] = []
    for query, source in zip(asked, own.tolist(), strict=True):
        text = next(iter(query.item.text.values()), "")
        records.append(
            record_of_kind(products.records[source], query.kind)
            if source >= 0
            else typed_record(text)
        )
    shown = dict(features)
    if "numbers" in products.features:
        shows_numbers = (own >= 0) & np.isin(
            [query.kind for query in asked], ("fused", "product:attribute")
        )
        shown["numbers"] = np.where(shows_numbers[:, None], products.features["numbers"][own], 0)
    return Untrained(records, shown)
