"""From a model and a catalogue to search results.

`python index.py embed | build | search | evaluate | update | ...`.

Each command explains its options: `python index.py search --help`. docs/index.md is the guide.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tritower.artefacts.storage import ArtefactError
from tritower.terminal.commands import make_parser, run

if TYPE_CHECKING:  # each command imports what it needs: help is there at once, building and searching need no torch
    import numpy as np

    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.ivf.engine import Settings
    from tritower.retrieval.more_like_this import Weighted
    from tritower.retrieval.products.catalogue import Card, PreparedCatalogue


def embed(
    model: Path,
    catalogue: Path,
    output: Path,
    batch_size: int = 256,
    num_workers: int = 0,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: str = "32-true",
    feature_cache: Path | None = None,
    skip_untrained: bool = False,
) -> int:
    """Embed a prepared catalogue.

    Products, its queries, and queries to tune by. Goes on where a killed run stopped.

    Args:
        model: model folder, as training exports it.
        catalogue: prepared catalogue.
        output: folder to make, with products/, queries/ and tuning/ in it.
        batch_size: items at a time.
        num_workers: processes that read and decode.
        accelerator: auto, cpu or gpu.
        devices: number of devices, or auto.
        precision: 32-true, or bf16-mixed on a GPU.
        feature_cache: folder of features of frozen towers that training made.
        skip_untrained: do not write the features of pretrained towers before training, from which
            evaluate shows what they find by themselves. They are written where the catalogue has
            queries, as float16.
    """
    from tritower.towers.embed import embed as embed_catalogue

    embed_catalogue(
        model,
        catalogue,
        output,
        batch_size=batch_size,
        num_workers=num_workers,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        feature_cache=feature_cache,
        untrained=not skip_untrained,
    )
    print(f"embeddings: {output}")
    return 0


def build(
    embeddings: Path,
    output: Path,
    ids: Path | None = None,
    id_column: str | None = None,
    embedding_column: str | None = None,
    metric: Literal["cosine", "inner_product", "kl"] | None = None,
    normalize: bool = False,
    factory: str = "auto",
    seed: int = 0,
    train_sample: int | None = None,
    strict: bool = False,
    nprobe: int | None = None,
    k_factor: float | None = None,
    spill: bool = False,
    recall: float | None = None,
    k: int = 10,
    memory: str | None = None,
    latency_ms: float | None = None,
    queries: Path | None = None,
    attributes: Path | None = None,
    build_memory: str | None = None,
    overwrite: bool = False,
) -> int:
    """Build an index from embeddings of ours or of anyone's, in bounded memory.

    Goes on where a killed run stopped.

    By default the index is exact while that is quick; larger ones are measured, and searched so
    that every kind of query that can be made of the catalogue reaches recall@10 .98. With a recall,
    candidates are compared, and what is built is published only if it reaches that recall for every
    kind of query.

    Args:
        embeddings: embeddings folder, folder of .parquet or .npy files, or one such file.
        output: the index folder to make.
        ids: for .npy, the ids: .txt, .npy, .csv or .parquet, one file or a folder of them.
        id_column: column of ids in Parquet; guessed when not given.
        embedding_column: column of vectors in Parquet; guessed when not given.
        metric: what vectors are compared by; what the embeddings say, else cosine.
        normalize: bring vectors of any length to length 1; without, they are refused.
        factory: FAISS factory string such as "IVF1024,PQ64x4fsr,Refine(SQ8)" or Flat; auto chooses
            by the number of vectors and says why.
        seed: of the training sample and of k-means.
        train_sample: number of training vectors; chosen by the number of lists when not given.
        strict: refuse to build an under-trained index.
        nprobe: lists a search visits unless told otherwise; measured when not given, or with a
            factory chosen by their number.
        k_factor: candidates re-ranked per result, where the index keeps finer vectors; measured
            when not given, or with a factory 8.
        spill: give every vector a second list: more recall from fewer lists, for twice the bytes of
            codes.
        recall: recall@k against exact search to reach, e.g. 0.95.
        k: of that recall.
        memory: what searches may touch again and again: 1GiB, 500MB. Vectors for re-ranking stay on
            disk.
        latency_ms: median time of one query on one thread to stay within.
        queries: embeddings of real queries to choose by, of all kinds; EMBEDDINGS/tuning when not
            given. Products as queries are always asked too.
        attributes: what filters ask for, by product id: a prepared catalogue, or Parquet or CSV
            files; those of the catalogue that was embedded when not given.
        build_memory: what the build may take; 80 % of what is free when not given.
        overwrite: publish a new version of an index that is there; the old one is kept.
    """
    from tritower.retrieval.building.build import Recipe, build_index
    from tritower.retrieval.building.resources import parse_bytes
    from tritower.retrieval.ivf.operating_points import Target
    from tritower.retrieval.showing.present import (
        describe_candidates,
        describe_index,
        describe_points,
        show,
    )
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    target = None
    if recall is not None:
        target = Target(recall, k, None if memory is None else parse_bytes(memory), latency_ms)
    elif memory is not None or latency_ms is not None:
        raise ValueError(
            "memory and latency_ms choose how to reach a recall: give recall, e.g. 0.95"
        )
    products = _side(embeddings, "products")
    reader = EmbeddingReader(
        products,
        ids=ids,
        id_column=id_column,
        embedding_column=embedding_column,
        metric=metric,
        normalize=normalize,
    )
    limit = None if build_memory is None else parse_bytes(build_memory)
    recipe = Recipe(factory, seed, train_sample, strict, nprobe, k_factor, spill, limit)
    asking = None if queries is None else _side(queries, "queries")
    if asking is None and (target is not None or recipe.is_default):
        asking = _tuning_beside(products)
    asked = (
        None
        if asking is None
        else EmbeddingReader(asking, metric=reader.metric, normalize=normalize, asks=True)
    )
    manifest = build_index(
        reader,
        output,
        recipe,
        target=target,
        queries=asked,
        attributes=attributes,
        overwrite=overwrite,
    )
    if "candidates" in manifest.meta:
        show(describe_candidates(manifest))
    if manifest.meta["target"] is not None:
        show(describe_points(output, manifest.meta["target"]["recall"]))
    show(describe_index(output, manifest))
    return 0


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
    """Search by any mix of text, pictures, attributes, products to be like or unlike and a vector; or for many queries.

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
    products = _weighted(opened, like, 1) + _weighted(opened, unlike, -1)
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
        _encode(opened, model, text, image, attribute) if text or image or attribute else ([], None)
    )
    weights = [1.0] * len(vectors)
    if unlike_text:
        vectors += _encode(opened, model, unlike_text, [], [])[0]
        weights.append(-1.0)
    for what, weight in products:
        vectors.append(as_queries(opened.vector_of(what), opened.metric))
        weights.append(weight)
    if vector is not None:
        vectors.append(_read_vector(vector, opened, normalize))
        weights.append(1.0)
    query = (
        vectors[0].reshape(1, -1) if weights == [1.0] else combined(vectors, weights, opened.metric)
    )
    settings = opened.resolve(
        nprobe, recall=recall, kind=_kind(text, image, attribute, bool(products or unlike_text))
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
    shown = card or _like_card(known, products[0].what if products else "")
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


def update(
    index: Path,
    upsert: Path | None = None,
    delete: Path | None = None,
    attributes: Path | None = None,
    model: Path | None = None,
    ids: Path | None = None,
    id_column: str | None = None,
    embedding_column: str | None = None,
    normalize: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
    compact: bool = False,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Bring an index up to date.

    Add, change and take out products. Only what has changed is embedded and encoded.

    The new version is published in one step and the old one kept. Goes on where a killed run
    stopped.

    Args:
        index: index folder.
        upsert: a prepared catalogue, of which products that are new or have changed are embedded;
            or embeddings, as build takes them.
        delete: text file of ids to take out, one per line.
        attributes: new attributes for filters, of some products or of all, as build takes them;
            those of the catalogue that the products are from when not given.
        model: for a catalogue, the model folder; the one that made the embeddings when not given.
        ids: for .npy, the ids, as in build.
        id_column: column of ids in Parquet; guessed when not given.
        embedding_column: column of vectors in Parquet; guessed when not given.
        normalize: bring vectors of any length to length 1.
        batch_size: products embedded at a time.
        num_workers: processes that read and decode.
        accelerator: auto, cpu or gpu, to embed on.
        precision: 32-true, or bf16-mixed on a GPU.
        compact: close up the rows of products that are gone even where they are few.
        strict: refuse ids to delete that are not there.
        json: print JSON.
    """
    from tritower.artefacts import storage
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.showing.present import describe_update, find_model, show
    from tritower.retrieval.updating.update import Catalogue, read_ids_to_delete, update_index
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    if upsert is None and delete is None and attributes is None and not compact:
        raise ValueError("nothing to do: give upsert, delete, attributes or compact")
    source: EmbeddingReader | Catalogue | None = None
    opened = ProductIndex.open(index, fall_back=False)
    if (
        upsert is not None
        and (upsert / storage.MANIFEST).exists()
        and storage.read_manifest(upsert).kind == "catalogue"
    ):
        folder = find_model(opened, model)

        from tritower.towers.changed_products import ChangedProducts
        from tritower.towers.embed import Options

        options = Options(
            batch_size, num_workers, accelerator, devices=1, precision=precision, progress=not json
        )
        source = ChangedProducts(folder, upsert, options)
    elif upsert is not None:
        source = EmbeddingReader(
            _side(upsert, "products"),
            ids=ids,
            id_column=id_column,
            embedding_column=embedding_column,
            metric=opened.metric,
            normalize=normalize,
        )
    gone = [] if delete is None else read_ids_to_delete(delete)
    report = update_index(
        index, upsert=source, delete=gone, attributes=attributes, compact=compact, strict=strict
    )
    if json:
        print(report.to_json())
    else:
        show(describe_update(report))
    return 0


def verify(index: Path) -> int:
    """Compare every byte of an index with its digests; the exit code is 1 where something is damaged.

    Opening an index does so too, but of very large files only for samples.

    Args:
        index: index folder: all its versions are read.
    """
    from tritower.artefacts import storage, versions

    folders = versions.versions(index) or [index]
    problems = []
    for folder in folders:
        try:
            manifest = storage.verify(folder, "index")
        except ArtefactError as error:
            problems.append(str(error))
            continue
        print(
            f"{folder}: {len(manifest.files)} files, {sum(e.bytes for e in manifest.files.values()):,} bytes: good"
        )
    if folders != [index]:
        print(f"in use: {versions.current(index).name}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def evaluate(
    index: Path,
    embeddings: Path,
    output: Path,
    catalogue: Path | None = None,
    queries_embeddings: Path | None = None,
    qrels: Path | None = None,
    split: str = "test",
    threshold: float | None = None,
    recall: float | None = None,
    nprobe: int | None = None,
    exclude_identical: bool = False,
    untrained: Path | None = None,
    latency_queries: int = 1000,
    examples: int = 2,
    oracle: Path | None = None,
    gate: list[str] = [],  # noqa: B006
    normalize: bool = False,
) -> int:
    """Measure an index on judged queries.

    Exact task, ANN task and ANN against exact, beside traditional search.

    Writes report.json and report.html, and prints a table. Warns of each kind of query that loses
    more than a point of hit@10 or recall@10 by the index.

    Args:
        index: index folder.
        embeddings: what `embed` made; or the products' embeddings alone, together with
            queries_embeddings.
        output: folder of the report.
        catalogue: prepared catalogue: judgements, splits and texts; the one that was embedded when
            not given.
        queries_embeddings: embedded queries; EMBEDDINGS/queries when not given.
        qrels: judgements as .csv or .parquet (query_id, product_id, relevance); the catalogue's
            when not given.
        split: queries to ask: train, val, test or all.
        threshold: lowest grade that is relevant; the highest there is when not given.
        recall: recall that searches are asked for; the one the index was built for when not given.
        nprobe: lists to visit; what each kind of query needs when not given.
        exclude_identical: also leave out products whose vector equals that of the product asked.
        untrained: features of the pretrained towers before training, as embed writes them;
            EMBEDDINGS/untrained when not given, and left out where there are none.
        latency_queries: timed searches; 0 for none.
        examples: queries of each kind to show with their hits.
        oracle: oracle.json of the sample catalogue, to show beside the figures.
        gate: figures that must be reached, else the exit code is 1: ann_vs_exact.*.recall@10>=0.95
        normalize: bring vectors of any length to length 1.
    """
    from tritower.retrieval.evaluating import evaluate as measuring
    from tritower.retrieval.evaluating import report
    from tritower.retrieval.evaluating.comparison_table import below_floor, terminal_table
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.showing.present import find_catalogue, show
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    opened = ProductIndex.open(index)
    known = find_catalogue(opened, catalogue)
    asked = queries_embeddings or embeddings / "queries"
    products = EmbeddingReader(
        _side(embeddings, "products"), metric=opened.metric, normalize=normalize
    )
    queries = EmbeddingReader(asked, metric=opened.metric, normalize=normalize, asks=True)
    options = measuring.Options(
        split=None if split == "all" else split,
        threshold=threshold,
        recall=recall,
        nprobe=nprobe,
        exclude_identical=exclude_identical,
        latency_queries=latency_queries,
    )
    towers = measuring.open_untrained(
        untrained or embeddings / "untrained", required=untrained is not None
    )
    measured = measuring.evaluate(
        opened, products, queries, catalogue=known, qrels=qrels, untrained=towers, options=options
    )
    sections = report.examples(measured, opened, known, examples) if known and examples else []
    report.write_report(
        output, measured, sections, measuring.read_oracle(oracle) if oracle else None
    )
    show(terminal_table(measured.report))
    print(report.summary(measured.report))
    for line in below_floor(measured.report):
        print(f"warning: {line}", file=sys.stderr)
    print(f"report: {output / 'report.json'}, page: {output / 'report.html'}")
    for warning in measured.report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    failures = measuring.failed_gates(measured.report, gate)
    for failure in failures:
        print(f"error: gate not reached: {failure}", file=sys.stderr)
    return 1 if failures else 0


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


def _weighted(index: ProductIndex, texts: list[str], sign: int) -> list[Weighted]:
    """Products to be like, or unlike, with their weights."""
    import pyarrow as pa

    from tritower.retrieval.more_like_this import parse_weighted

    def is_id(text: str) -> bool:
        return bool((index.rows_of(pa.array([text])) >= 0).all())

    return [parse_weighted(text, is_id, sign=sign) for text in texts]


def _kind(text: str, image: list[Path], attribute: list[str], more: bool) -> str | None:
    """The kind of a query as embeddings name it; None for a mix, which is searched well enough for every kind."""
    shown = {"text": text, "image": image, "product:attribute": attribute, "product": more}
    kinds = [kind for kind, what in shown.items() if what]
    return kinds[0] if len(kinds) == 1 else None


def _picture(file: Path) -> bytes:
    """A user's photo, made small as those of the catalogue were.

    Queries and products are seen alike.
    """
    from tritower.datamodules.images import ImageError, downsize

    try:
        return downsize(file.read_bytes())
    except ImageError as error:
        raise ValueError(f"{file}: {error}") from None


def _encode(
    index: ProductIndex, model: Path | None, text: str, image: list[Path], attribute: list[str]
) -> tuple[list[np.ndarray], Card]:
    """The vector of one query item, and what to show of it."""
    from tritower.retrieval.products.catalogue import Card
    from tritower.retrieval.showing.present import find_model

    folder = find_model(index, model)

    from tritower.datamodules.batch import Item
    from tritower.datamodules.prepare.catalogue import parse_attribute
    from tritower.datamodules.schema import Schema
    from tritower.towers.model_folder import load_model

    known = {a.name: a for a in Schema.load(folder / "schema.json").attributes}
    attributes = {}
    for fact in attribute:
        name, equals, value = fact.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"attribute {fact!r}; expected name=value with one of {', '.join(known) or 'none'}"
            )
        attributes[name] = parse_attribute(known[name], value)
    item = Item({"query": text} if text else {}, [_picture(file) for file in image], attributes)
    return list(load_model(folder).encode([item], side="query")), Card(
        *item[:1], item.attributes, item.images
    )


def _like_card(catalogue: PreparedCatalogue | None, like: str) -> Card:
    from tritower.retrieval.products.catalogue import Card

    known = catalogue.products([like], images=True) if catalogue and like else {}
    return known.get(like, Card({"query": f"like {like}"} if like else {"query": "a vector"}))


def _read_vector(file: Path, index: ProductIndex, normalize: bool) -> np.ndarray:
    import numpy as np

    from tritower.retrieval.vectors.checks import checked_vectors

    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a .npy file of numbers: {error}") from None
    array = array[None] if array.ndim == 1 else array
    if array.ndim == 2 and len(array) != 1:
        raise ValueError(
            f"{file} holds {len(array)} vectors: search for many with queries and output"
        )
    return checked_vectors(
        array, dim=index.dim, metric=index.metric, normalize=normalize, where=str(file)
    )[0]


def _tuning_beside(products: Path) -> Path | None:
    """The queries to tune by that `embed` made beside the products, where it did."""
    tuning = products.parent / "tuning"
    return tuning if products.name == "products" and tuning.is_dir() else None


def _side(embeddings: Path, side: str) -> Path:
    """EMBEDDINGS/products where `embed` made both sides, else the folder itself."""
    return embeddings / side if (embeddings / side).is_dir() else embeddings


COMMANDS: dict[str, Callable[..., int]] = {
    "embed": embed,
    "build": build,
    "search": search,
    "evaluate": evaluate,
    "update": update,
    "verify": verify,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `tritower-index`; returns the exit code.

    1 for a problem with what was given, 2 for usage.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tritower").setLevel(logging.INFO)
    parser = make_parser("index.py", __doc__ or "", COMMANDS)
    try:
        return int(run(parser, COMMANDS, arguments))
    except (ArtefactError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
