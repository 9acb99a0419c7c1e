"""How far counting goes where products name what goes with them.

No model, no features, no training.

    python -m benchmarks.popular --data DIR [--only luma] [--split val|test]

After its own family, the products relevant to it are those that the most products of its category
name. Counted over the judgements that training may use, and, as a bound of what categories tell,
over all judgements but those of the query's own family.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pyarrow import csv

from benchmarks.command import Split, run
from tritower.retrieval.ranking.metrics import ndcg_at_k


def shares(
    linked: NDArray[np.bool_], category: NDArray[np.int64], family: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(N, N): how many products of the row's category, not of its family, name the column.

    Equals are settled by how many products of other families name it, of any category.

    Args:
        linked: (N, N) which products (rows) name which (columns).
        category: (N,) of each product.
        family: (N,) of each product.
    """
    others = linked.any(1) & (family[:, None] != family)
    of_category, of_any = (
        (counted @ linked) / np.maximum(counted.sum(1, keepdims=True), 1)
        for counted in (np.float64(others & (category[:, None] == category)), np.float64(others))
    )
    return of_category + of_any / 1000


def ndcg(
    score: NDArray[np.float64], grades: NDArray[np.float64], query_rows: NDArray[np.int64]
) -> float:
    """nDCG@10 of products as queries, which never find themselves; (N, N) scores and grades."""
    score = score.copy()
    np.fill_diagonal(score, -np.inf)
    found = np.argsort(-score[query_rows], axis=1, kind="stable")[:, : min(10, len(grades) - 1)]
    everything = np.broadcast_to(np.arange(len(grades)), (len(query_rows), len(grades)))
    return ndcg_at_k(found, everything, grades[query_rows], found.shape[1])


def main(data: Path, only: str = "luma", split: Split = "val") -> None:
    """Count and measure.

    Args:
        data: folder of the raw catalogues of docs/data.md.
        only: name of the catalogue.
        split: whose products ask.
    """
    products, queries, qrels = (
        csv.read_csv(
            data / only / f"{name}.csv", parse_options=csv.ParseOptions(newlines_in_values=True)
        ).to_pydict()
        for name in ("products", "queries", "qrels")
    )
    row = {product_id: number for number, product_id in enumerate(products["id"])}
    asks = {}
    for q, s in zip(queries["query_id"], queries["source_product_id"], strict=True):
        if s:
            asks[q] = row[s]
    grades = np.zeros((len(row), len(row)))
    for query_id, product_id, grade in zip(
        *(qrels[c] for c in ("query_id", "product_id", "relevance")), strict=True
    ):
        if query_id in asks:
            grades[asks[query_id], row[product_id]] = grade
    families = [f or i for f, i in zip(products["family_id"], products["id"], strict=True)]
    family, category = (
        np.unique(values, return_inverse=True)[1] for values in (families, products["category"])
    )
    of_split = {name: np.array(products["split"]) == name for name in ("train", split)}
    query_rows = np.flatnonzero(of_split[split] & (grades == grades.max()).any(1))
    same_family = family[:, None] == family
    links = (grades > 0) & ~same_family
    known = np.outer(of_split["train"], of_split["train"])
    print(f"{only}, {len(query_rows)} query products of {split}, nDCG@10")
    for name, counted in (
        ("judgements of train", links & known),
        ("all judgements but the family's own", links),
    ):
        score = 10 * same_family + shares(counted, category, family)
        print(f"{name:36} {ndcg(score, grades, query_rows):.3f}")


if __name__ == "__main__":
    run("benchmarks.popular", main, "How far counting goes.")
