"""The files of an index version, and opening them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError, Manifest
from tritower.retrieval.id_table import IdTable
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.ivf.layout import IDS_FILE
from tritower.retrieval.ivf.operating_points import Tuning
from tritower.retrieval.products.attribute_table import ATTRIBUTES_FILE, AttributeTable

ARTEFACT_TYPE = "index"
FORMAT = 2
READABLE = (FORMAT,)
"""Formats that open."""

SETTINGS_FILE = "settings.json"


class IndexFiles(NamedTuple):
    """The opened files of one version.

    Attributes:
        manifest: with digests and facts.
        engine: the FAISS side.
        ids: row number -> product id.
        settings: how it is searched by default.
        tuning: operating points, where they were measured.
        attributes: for filters, or None.
    """

    manifest: Manifest
    engine: Engine
    ids: IdTable
    settings: Settings
    tuning: Tuning | None
    attributes: AttributeTable | None


def open_files(path: Path) -> IndexFiles:
    """Open the files of one version.

    Raises:
        ArtefactError: damaged files, of another format, or files that do not belong together.
    """
    manifest = storage.verify(path, ARTEFACT_TYPE, fast=True)
    if manifest.meta.get("format") not in READABLE:
        raise ArtefactError(
            f"{path}: index format {manifest.meta.get('format')}, this program reads {READABLE}: "
            "build it anew, or upgrade the program"
        )
    # The FAISS files, then the tables beside them.
    engine = Engine.open(path, manifest.meta)
    attributes = None
    tuning = None
    try:
        ids = IdTable(path / IDS_FILE)
        if ATTRIBUTES_FILE in manifest.files:
            attributes = AttributeTable(path / ATTRIBUTES_FILE)
        stored = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        if "tuning" in stored:
            tuning = Tuning.from_json(stored.pop("tuning"))
        settings = Settings(**stored).checked(engine.lists)
    except (pa.ArrowInvalid, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtefactError(f"{path} cannot be opened as an index: {error}") from None
    # Files of two versions must never be mixed.
    if len(ids) != engine.count:
        raise ArtefactError(
            f"{path}: files do not belong together: {engine.count} vectors, {len(ids)} ids"
        )
    if attributes is not None and len(attributes) != len(ids):
        raise ArtefactError(
            f"{path}: files do not belong together: {len(ids)} ids, attributes of {len(attributes)}"
        )
    return IndexFiles(manifest, engine, ids, settings, tuning, attributes)
