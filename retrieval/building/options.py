"""Options of a build, and what a build returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tritower.retrieval.building.choose_spec import default_nprobe
from tritower.retrieval.ivf.engine import Settings


@dataclass(frozen=True)
class BuildOptions:
    """How to build an index.

    Attributes:
        factory: a FAISS factory string, or "auto" to choose by the number of vectors.
        seed: of the training sample and of k-means.
        train_sample: number of training vectors; None chooses by the number of lists.
        strict: refuse an under-trained index instead of warning.
        nprobe: lists a search scans by default; None measures the default index, and chooses by the
            number of lists for a named factory.
        k_factor: a search re-ranks k_factor x k candidates if the index has refine vectors; None
            measures the default index, and takes 8 for a named factory.
        spill: put every vector into a second list: more recall from fewer lists, for twice the
            bytes of codes.
        memory: bytes that the build may use; None for 80 % of the free memory.
    """

    factory: str = "auto"
    seed: int = 0
    train_sample: int | None = None
    strict: bool = False
    nprobe: int | None = None
    k_factor: float | None = None
    spill: bool = False
    memory: int | None = None

    @property
    def is_default(self) -> bool:
        """Whether neither the index nor its search settings are named: both are chosen."""
        return self.factory == "auto" and self.nprobe is None and self.k_factor is None

    def settings(self, lists: int | None) -> Settings:
        """Search settings of an index with this many lists, if they are not measured."""
        nprobe = self.nprobe
        if lists and nprobe is None:
            nprobe = default_nprobe(lists)
        if self.k_factor is None:
            k_factor = Settings().k_factor
        else:
            k_factor = self.k_factor
        return Settings(nprobe, k_factor).checked(lists)


class BuildResult(NamedTuple):
    """What was written to the folder of a version.

    Attributes:
        settings: content of its settings.json.
        manifest: factory, reason, spill and training, for its manifest.
    """

    settings: dict[str, Any]
    manifest: dict[str, Any]
