"""What the commands print: hits as a table, JSON or a page, and what was built."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box, filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError, Manifest
from tritower.retrieval.index import ProductIndex, Settings
from tritower.retrieval.ivf.spec import parse_ivf_pq
from tritower.retrieval.products.catalogue import Card, PreparedCatalogue
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.showing.pages import Hit, Section, facts_of, write_sheet
from tritower.retrieval.updating.update import UpdateReport

NARROWEST = 100
"""Columns assumed where the output is no terminal."""


@dataclass(frozen=True)
class SearchResult:
    """The hits of one query, ready to be shown.

    Attributes:
        index: what was searched.
        query: the query as shown.
        hits: of this one query: (1, K).
        wanted: the number of hits that were requested.
        settings: how it was searched.
        catalogue: has titles and pictures; None where it is not known.
        matching: number of products that the filter matches; None without a filter.
    """

    index: ProductIndex
    query: Card
    hits: Hits
    wanted: int
    settings: Settings
    catalogue: PreparedCatalogue | None
    matching: int | None = None

    def scored(self) -> list[tuple[str, float]]:
        """Product ids with their scores, best first; rows of -1 are no hits."""
        found = self.hits.rows[0] >= 0
        ids = self.index.ids(self.hits.rows[0][found])
        return list(zip(ids.tolist(), self.hits.scores[0][found].tolist(), strict=True))

    def note(self) -> str:
        """Why there are fewer hits than were asked for; empty where there are not."""
        count = len(self.scored())
        if count >= self.wanted:
            return ""
        if self.matching is not None:
            return f"{count} hits: the filter matches {self.matching:,} products"
        if len(self.index) <= self.wanted:
            return f"{count} hits: the index holds {len(self.index)} products"
        lists = self.settings.nprobe
        return f"{count} of {self.wanted} hits found in {lists} lists: visit more with nprobe"

    def hits_with_cards(self, images: bool = False) -> list[Hit]:
        """The hits with their titles, pictures and attributes."""
        scored = self.scored()
        if self.catalogue:
            cards = self.catalogue.products({i for i, _ in scored}, images=images)
        else:
            cards = {}
        result = []
        for product_id, score in scored:
            result.append(Hit(product_id, score, cards.get(product_id, Card())))
        return result

    def table(self) -> Table:
        """Rank, score, id, and title and telling attributes where the catalogue is known."""
        hits = self.hits_with_cards()
        # Columns: the first attributes that the hits have.
        names = list(
            dict.fromkeys(name for hit in hits for name, _ in facts_of(hit.card.attributes, 3))
        )[:3]
        table = Table()
        for name in ("rank", "score"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("id", overflow="fold")
        for name in ["title", *names] if self.catalogue else []:
            table.add_column(Text(name), overflow="fold")
        for rank, hit in enumerate(hits, 1):
            facts = dict(facts_of(hit.card.attributes, len(hit.card.attributes)))
            if self.catalogue:
                words = [hit.card.title, *(facts.get(name, "") for name in names)]
            else:
                words = []
            table.add_row(
                str(rank), f"{hit.score:.4f}", *(Text(word) for word in (hit.product_id, *words))
            )
        return table

    def as_json(self) -> str:
        """The hits and how they were found, as one JSON object."""
        hits = []
        for rank, hit in enumerate(self.hits_with_cards(), 1):
            hits.append(
                {
                    "rank": rank,
                    "product_id": hit.product_id,
                    "score": round(hit.score, 6),
                    "text": dict(hit.card.text),
                    "attributes": dict(hit.card.attributes),
                }
            )
        report: dict[str, Any] = {
            "query": {"text": dict(self.query.text), "attributes": dict(self.query.attributes)},
            "wanted": self.wanted,
            "returned": len(hits),
            "settings": self.settings._asdict(),
            "index": self.index.manifest.fingerprint,
            "hits": hits,
        }
        return json.dumps(report, indent=1, ensure_ascii=False)

    def write_html(self, file: Path) -> None:
        """A page with the query and its hits as pictures."""
        note = self.note() or f"{len(self.scored())} hits among {len(self.index):,} products"
        write_sheet(file, [Section(self.query, self.hits_with_cards(images=True))], note)

    def show(self) -> None:
        """Print the table, and on stderr why it is shorter than asked for."""
        show(self.table())
        if note := self.note():
            print(note, file=sys.stderr)


def find_catalogue(index: ProductIndex, path: Path | None) -> PreparedCatalogue | None:
    """The catalogue that is named, else the one the index was made from, if unchanged.

    Raises:
        ArtefactError: the named folder is no catalogue.
    """
    if path is not None:
        return PreparedCatalogue(path)
    hint = index.manifest.meta.get("hints", {}).get("catalogue")
    try:
        catalogue = PreparedCatalogue(hint) if hint else None
    except ArtefactError:
        return None
    if catalogue and catalogue.fingerprint == index.manifest.meta["catalogue"]:
        return catalogue
    return None


def find_model(index: ProductIndex, path: Path | None) -> Path:
    """The model that is named, else the one the index remembers; checked against the index.

    Raises:
        ArtefactError: no model is known, or the embeddings are of another one.
    """
    hint = index.manifest.meta.get("hints", {}).get("model")
    if path is None and (hint is None or not Path(hint).is_dir()):
        raise ArtefactError(
            f"no model at hand to encode the query with (the index names {hint}): name it with "
            "--model"
        )
    path = Path(hint) if path is None else path
    index.check_model(storage.read_manifest(path, "model").fingerprint, str(path))
    return path


def describe_index(path: Path, manifest: Manifest) -> Table:
    """What an index is, as a table of two columns."""
    meta = manifest.meta
    size = sum(entry.bytes for entry in manifest.files.values())
    training = meta["training"]
    facts = {
        "index": str(path),
        "products": f"{meta['count']:,} of {meta['dim']} dimensions, {meta['metric']}",
        "factory": meta["factory"],
        "reason": meta["reason"],
        "size": f"{filesize.decimal(size)}, {size / meta['count']:,.0f} bytes a product",
        "model": meta["model"] or "unknown",
    }
    if training["vectors"]:
        if "per_list" in training:
            per_list = f", {training['per_list']:g} for each list"
        else:
            per_list = ""
        facts["trained"] = (
            f"on {training['vectors']:,} vectors (seed {training['seed']}){per_list}, "
            f"{training['device']}"
        )
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    return table


def describe_candidates(manifest: Manifest) -> Table:
    """The indexes that were compared, the chosen one first."""
    table = Table(
        title="Candidates, predicted for all vectors: the slowest query type, s to encode",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    names = (
        "lists",
        "each in",
        "code B",
        "recall",
        "p50 ms",
        "p99 ms",
        "QPS",
        "resident B",
        "disk B",
        "s",
        "",
    )
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    count = manifest.meta["count"]
    # The first candidate was chosen; the others show why they were not.
    for place, one in enumerate(manifest.meta["candidates"]):
        spec = parse_ivf_pq(one["factory"])
        point = one["point"]
        figures = ["", "", "", ""]
        if point is not None:
            figures = [
                f"{point['recall']:.4f}",
                f"{point['p50_ms']:.3f}",
                f"{point['p99_ms']:.3f}",
                f"{point['qps']:,}",
            ]
        table.add_row(
            f"{spec.lists:,}" if spec else one["factory"],
            str(1 + one["spill"]),
            str(spec.code_size) if spec else "",
            *figures,
            f"{one['resident_bytes'] / count:,.0f}",
            f"{one['disk_bytes'] / count:,.0f}",
            "" if one["seconds"] is None else f"{one['seconds']:.1f}",
            one["rejected_because"]
            or ("chosen" if not place else "" if point else f"at most {one['best_recall']:.3f}"),
        )
    return table


def describe_points(path: Path, recall: float) -> Table:
    """How a built index reaches how much recall.

    For each query type the cheapest way to a few of them.
    """
    tuning = ProductIndex.open(path).tuning
    table = Table(
        title="Operating points, on all vectors", title_justify="left", box=box.SIMPLE_HEAD
    )
    names = (
        "query_type",
        "for",
        "nprobe",
        "k_factor",
        "recall",
        "+-",
        "p50 ms",
        "p99 ms",
        "queries/s",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "query_type" else "right", no_wrap=True)
    if tuning is None:
        return table
    for query_type in tuning.points:
        # A few recalls beside the one that the index was built for.
        for wanted in sorted({recall, 0.9, 0.95, 0.99}):
            point = tuning.nearest(wanted, query_type)
            if point.reaches(wanted) or wanted == recall:
                if wanted == recall:
                    label = f"{wanted:g} *"
                else:
                    label = f"{wanted:g}"
                table.add_row(
                    query_type,
                    label if point.reaches(wanted) else f"below {label}",
                    str(point.nprobe),
                    f"{point.k_factor:g}",
                    f"{point.held_out:.4f}",
                    f"{point.interval:.4f}",
                    f"{point.p50_ms:.3f}",
                    f"{point.p99_ms:.3f}",
                    f"{point.qps:,.0f}",
                )
    table.caption = (
        "* what it is searched for by default; recall of queries that had no part in the choice"
    )
    return table


def describe_update(report: UpdateReport) -> Table:
    """What an update did, and how the index was before and after it."""
    if report.version:
        title = f"version {report.version}"
    else:
        title = "nothing to do"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("given", "added", "replaced", "unchanged", "deleted"):
        table.add_row(name, "", f"{getattr(report, name):,}")
    if report.unknown:
        examples = ", ".join([*report.unknown[:3], *["..."] * (len(report.unknown) > 3)])
        table.add_row(Text(f"to delete, but not there: {examples}"), "", f"{len(report.unknown):,}")
    table.add_row("products", "", f"{report.count:,}")
    table.add_row(
        "rows, empty ones closed up" if report.compacted else "rows", "", f"{report.rows:,}"
    )
    # The state of the index before and after.
    if report.before is not None and report.after is not None:
        table.add_section()
        names = {
            "recall": "recall@10 of products",
            "imbalance": "imbalance of lists",
            "list_error": "distance to lists' centers",
            "new_list_error": "the same of new products",
            "code_error": "distance to codes",
            "new_code_error": "the same of new products",
            "new_refine_error": "distance of new products to vectors to re-rank by",
            "tombstone_share": "share of empty rows",
        }
        for name, words in names.items():
            values = (getattr(state, name) for state in (report.before, report.after))
            table.add_row(words, *("" if value is None else f"{value:.4f}" for value in values))
    table.caption = report.recommendation
    table.caption_justify = "left"
    return table


def show(table: Table) -> None:
    """Print a table; wide enough to be read from a file too."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, NARROWEST))
    console.print(table)
