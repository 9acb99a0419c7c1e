"""`index.py search`: one query or many, and their hits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tritower.commands.options import EffortOptions
from tritower.commands.query import QueryOptions, parse_query

if TYPE_CHECKING:
    from tritower.retrieval.index import ProductIndex


@dataclass(frozen=True)
class HitOptions:
    """Which products may be found, and how many.

    Attributes:
        k: number of hits.
        filter: only matching products: 'price<50 and brand in (Acme, Zed) and category under
            "Shoes"'.
        group_by: find at most one product of each group, or of each family.
        include_groups: also find products of the same group as those to be like or unlike: offers
            of the same thing.
    """

    k: int = 10
    filter: str | None = None
    group_by: Literal["group", "family"] | None = None
    include_groups: bool = False


@dataclass(frozen=True)
class BulkOptions:
    """Search for many queries at once.

    Attributes:
        queries: embeddings of many queries (embeddings folder or Parquet files); needs output.
        output: a .parquet file, or a folder of shards, for the hits. A killed run is continued by
            the same command.
        exclude_self: leave out the product with the query's own id: similar items of a catalogue.
    """

    queries: Path | None = None
    output: Path | None = None
    exclude_self: bool = False


@dataclass(frozen=True)
class OutputOptions:
    """How hits are shown.

    Attributes:
        json: print JSON.
        html: write a page with pictures to this file.
        catalogue: prepared catalogue, for titles and pictures; the one that was embedded when not
            given.
    """

    json: bool = False
    html: Path | None = None
    catalogue: Path | None = None


def search(
    index: Path,
    query: QueryOptions,
    hits: HitOptions,
    effort: EffortOptions,
    bulk: BulkOptions,
    output: OutputOptions,
) -> int:
    """Search by text, pictures, attributes, similar products or a vector; or for many queries.

    Text, pictures and attributes together are one query, which the model encodes. Each product to
    be like and a vector count as much as it: the query is the sum of the unit vectors. What to be
    unlike is subtracted.

    Args:
        index: index folder.
        query: the query
        hits: which products may be found, and how many
        effort: how much searches look at
        bulk: many queries at once
        output: how hits are shown
    """
    from tritower.retrieval.index import ProductIndex

    opened = ProductIndex.open(index)
    # Many queries from a file, or one query from options.
    if bulk.queries is not None or bulk.output is not None:
        if not query.is_empty or output.json or output.html:
            raise ValueError(
                "queries and output go together, and with no single query, json or html"
            )
        return _search_many(opened, bulk, hits, effort, query.normalize)
    if bulk.exclude_self:
        raise ValueError("exclude_self is for many queries (queries, output)")
    return _search_one(opened, query, hits, effort, output)


def _search_one(
    index: ProductIndex,
    query: QueryOptions,
    options: HitOptions,
    effort: EffortOptions,
    output: OutputOptions,
) -> int:
    import numpy as np

    from tritower.retrieval.filtering.filtered_search import Exclusion
    from tritower.retrieval.index import checked_k
    from tritower.retrieval.index_origins import find_catalogue
    from tritower.retrieval.showing.search_result import SearchResult

    catalogue = find_catalogue(index, output.catalogue)
    parsed = parse_query(index, query, catalogue)
    settings = index.resolve(effort.nprobe, recall=effort.recall, query_type=parsed.query_type)
    has_groups = index.attributes is not None and "group" in index.attributes.attribute_types
    # Products that are searched by, and others of their groups, are left out.
    hits = index.search(
        parsed.vector,
        checked_k(options.k),
        settings=settings,
        filter=options.filter,
        exclude=Exclusion(
            np.array([index.row_of(product) for product in parsed.products], np.int64),
            groups=has_groups and not options.include_groups,
        ),
        group_by=options.group_by,
    )
    if options.filter is None:
        matching = None
    else:
        matching = index.count(options.filter)
    found = SearchResult(index, parsed.card, hits, options.k, settings, catalogue, matching)
    if output.html is not None:
        found.write_html(output.html)
    if output.json:
        print(found.as_json())
        return 0
    found.show()
    if output.html is not None:
        print(f"page: {output.html}")
    return 0


def _search_many(
    index: ProductIndex,
    bulk: BulkOptions,
    options: HitOptions,
    effort: EffortOptions,
    normalize: bool,
) -> int:
    from tritower.retrieval.bulk import bulk_search
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    if bulk.queries is None or bulk.output is None:
        raise ValueError("queries and output go together, and with no single query, json or html")
    reader = EmbeddingReader(bulk.queries, metric=index.metric, normalize=normalize, asks=True)
    result = bulk_search(
        index,
        reader,
        bulk.output,
        k=options.k,
        settings=index.resolve(effort.nprobe, recall=effort.recall),
        exclude_self=bulk.exclude_self,
        filter=options.filter,
        group_by=options.group_by,
    )
    done_before = result.queries - result.searched
    if done_before:
        earlier = f", {done_before:,} of them in an earlier run"
    else:
        earlier = ""
    print(f"hits: {bulk.output}: {result.hits:,} for {result.queries:,} queries{earlier}")
    if result.hits < result.queries * options.k:
        if options.filter is None:
            reason = f"the index holds {len(index):,} products"
        else:
            reason = f"the filter matches {index.count(options.filter):,} products"
        print(f"fewer than {options.k} hits for some queries: {reason}", file=sys.stderr)
    return 0
