"""The hits of one query: as a table, JSON or a page."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tritower.retrieval.index import ProductIndex, Settings
from tritower.retrieval.products.catalogue import Card, PreparedCatalogue
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.showing.pages import Hit, Section, facts_of, write_sheet
from tritower.terminal.tables import show


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
