"""The model and the catalogue of an index, where it was built or where they are now."""

from __future__ import annotations

from pathlib import Path

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.catalogue import PreparedCatalogue


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
