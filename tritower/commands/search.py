"""`index.py search`: one query or many, and their hits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tritower.commands.query import (
    encode_query,
    parse_products,
    query_card_of_product,
    query_type,
    read_vector,
)

if TYPE_CHECKING:
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.ivf.engine import Settings


def search(
    index: Path,
    model: Path | None = None,
    catalogue: Path | None = None,
    text: str = "",
    image: list[Path] = [],  # noqa: B006  # nobody changes it, and None would mean the same as an empty list
    attribute: list[str] = [],  # noqa: B006
    like: list[str] = [],  # noqa: B006
    unlike: list[str] = [],  # noqa: B006
    unlike_text: str = "",
    vector: Path | None = None,
    filter: str | None = None,
    one_per: Literal["group", "family"] | None = None,
    include_groups: bool = False,
    k: int = 10,
    recall: float | None = None,
    nprobe: int | None = None,
    json: bool = False,
    html: Path | None = None,
    queries: Path | None = None,
    output: Path | None = None,
    exclude_self: bool = False,
    normalize: bool = False,
) -> int:
    """Search by text, pictures, attributes, similar products or a vector; or for many queries.

    Text, pictures and attributes together are one query, which the model encodes. Each product to
    be like and a vector count as much as it: the query is the sum of the unit vectors. What to be
    unlike is subtracted.

    Args:
        index: index folder.
        model: model folder; the one that made the embeddings when not given.
        catalogue: prepared catalogue, for titles and pictures; the one that was embedded when not
            given.
        text: what a customer types.
        image: picture files, of one thing.
        attribute: facts as name=value, e.g. brand=Acme price=59.9 "category=Shoes > Boots"
            "tags=red|wool".
        like: ids of products, each as ID or ID=WEIGHT; they and all of their groups are left out of
            the hits.
        unlike: ids of products to lead away from, in the same way.
        unlike_text: a text to lead away from.
        vector: .npy file with one vector.
        filter: what may be found: 'price<50 and brand in (Acme, Zed) and category under "Shoes"'.
        one_per: find at most one product of each group, or of each family.
        include_groups: find products of the same group as those to be like or unlike, too: offers
            of the same thing.
        k: number of hits.
        recall: recall against exact search to reach, of an index that was built for one; the
            cheapest way is taken.
        nprobe: lists to visit; more find more and take longer.
        json: print JSON.
        html: write a page with pictures to this file.
        queries: embeddings of many queries (embeddings folder or Parquet files); needs output.
        output: where the hits of many queries go: a .parquet file, or a folder of shards. Goes on
            where a killed run stopped.
        exclude_self: of many queries, leave out the product with the query's own id: similar items
            of a catalogue.
        normalize: bring given vectors of any length to length 1.
    """
    from tritower.retrieval.index import ProductIndex, checked_k
    from tritower.retrieval.more_like_this import combined
    from tritower.retrieval.showing.present import Found, find_catalogue
    from tritower.retrieval.vectors.checks import as_queries

    opened = ProductIndex.open(index)
    products = parse_products(opened, like, 1) + parse_products(opened, unlike, -1)
    one = any((text, image, attribute, products, unlike_text, vector))
    if queries is not None or output is not None:
        if queries is None or output is None or one or json or html:
            raise ValueError(
                "queries and output go together, and with no single query, json or html"
            )
        settings = opened.resolve(nprobe, recall=recall)
        return _search_many(
            opened, queries, output, k, settings, exclude_self, normalize, filter, one_per
        )
    if exclude_self:
        raise ValueError("exclude_self is for many queries (queries, output)")
    known = find_catalogue(opened, catalogue)
    vectors, card = (
        encode_query(opened, model, text, image, attribute)
        if text or image or attribute
        else ([], None)
    )
    weights = [1.0] * len(vectors)
    if unlike_text:
        vectors += encode_query(opened, model, unlike_text, [], [])[0]
        weights.append(-1.0)
    for what, weight in products:
        vectors.append(as_queries(opened.vector_of(what), opened.metric))
        weights.append(weight)
    if vector is not None:
        vectors.append(read_vector(vector, opened, normalize))
        weights.append(1.0)
    query = (
        vectors[0].reshape(1, -1) if weights == [1.0] else combined(vectors, weights, opened.metric)
    )
    settings = opened.resolve(
        nprobe,
        recall=recall,
        kind=query_type(text, image, attribute, bool(products or unlike_text)),
    )
    import numpy as np

    hits = opened.search(
        query,
        checked_k(k),
        settings=settings,
        filter=filter,
        without=np.array([opened.row_of(what) for what, _ in products], np.int64),
        without_groups=not include_groups
        and opened.attributes is not None
        and "group" in opened.attributes.kinds,
        one_per=one_per,
    )
    matching = None if filter is None else opened.count(filter)
    shown = card or query_card_of_product(known, products[0].what if products else "")
    found = Found(opened, shown, hits, k, settings, known, matching)
    if html is not None:
        found.write_html(html)
    if json:
        print(found.as_json())
    else:
        found.show()
        if html is not None:
            print(f"page: {html}")
    return 0


def _search_many(
    index: ProductIndex,
    queries: Path,
    output: Path,
    k: int,
    settings: Settings,
    exclude_self: bool,
    normalize: bool,
    filter: str | None,
    one_per: Literal["group", "family"] | None,
) -> int:
    from tritower.retrieval.bulk import bulk_search
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    reader = EmbeddingReader(queries, metric=index.metric, normalize=normalize, asks=True)
    result = bulk_search(
        index,
        reader,
        output,
        k=k,
        settings=settings,
        exclude_self=exclude_self,
        filter=filter,
        one_per=one_per,
    )
    done_before = result.queries - result.searched
    earlier = f", {done_before:,} of them in an earlier run" if done_before else ""
    print(f"hits: {output}: {result.hits:,} for {result.queries:,} queries{earlier}")
    if result.hits < result.queries * k:
        what = "the index holds" if filter is None else "the filter matches"
        count = len(index) if filter is None else index.count(filter)
        print(f"fewer than {k} hits for some queries: {what} {count:,} products", file=sys.stderr)
    return 0
