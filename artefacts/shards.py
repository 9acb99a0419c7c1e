"""A folder filled shard after shard, over several runs if need be.

An interrupted job continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tritower.artefacts import storage
from tritower.artefacts.storage import JSON, ArtefactError, Manifest
from tritower.artefacts.temporaries import is_temporary

BEGUN = "begun.json"


class ShardFolder:
    """Writes Parquet shards into a folder, each complete or absent.

    `finish` makes it an artefact folder.

    Opening a folder that an earlier run began continues it, provided that both make the same
    thing.

    Args:
        path: the folder; made when missing.
        artefact_type: the type of artefact folder it becomes.
        identity: what decides the content (model, source, settings). A folder begun with another
            one is refused.

    Raises:
        ArtefactError: the folder holds something else; the message shows both identities.
    """

    def __init__(
        self, path: Path | str, *, artefact_type: str, identity: Mapping[str, JSON]
    ) -> None:
        self.path = Path(path)
        self.artefact_type = artefact_type
        self.identity = json.loads(json.dumps(identity))
        self.finished = (self.path / storage.MANIFEST).exists()
        # A finished folder is checked by its manifest, an unfinished one by the identity that its
        # first run wrote. Anything else in the folder is not ours.
        if self.finished:
            meta = storage.verify(self.path, artefact_type).meta
            self._check_same({name: meta.get(name) for name in self.identity})
        elif (self.path / BEGUN).exists():
            self._check_same(self._read_begun())
        elif self.path.exists() and not all(
            is_temporary(entry.name) for entry in self.path.iterdir()
        ):
            raise ArtefactError(
                f"{self.path} exists and was not begun by this program: choose another place"
            )
        else:
            storage.write_json(self.path / BEGUN, self.identity)

    def done(self, shard: str) -> bool:
        """Whether an earlier run, or this one, has written this shard."""
        return self._file(shard).exists()

    def write(self, shard: str, table: pa.Table, *, row_group_size: int = 16_384) -> None:
        """Write one shard: after a crash at any moment it is there as a whole or not at all.

        Only text is compressed: numbers of vectors hardly shrink and would be slow to read.
        """
        if self.finished:
            raise ArtefactError(f"{self.path} is finished: {shard} cannot be added")
        # Dictionary encoding and compression pay off for text only.
        text = [field.name for field in table.schema if pa.types.is_string(field.type)]
        compression = {name: "zstd" if name in text else "none" for name in _leaves(table.schema)}
        with storage.write_file(self._file(shard)) as temporary, storage.create(temporary) as file:
            pq.write_table(
                table,
                file,
                row_group_size=row_group_size,
                compression=compression,
                use_dictionary=text,
            )

    def finish(self, shards: Sequence[str], meta: Mapping[str, JSON] | None = None) -> Manifest:
        """Check that exactly these shards are there and write the manifest.

        Harmless when it exists already.

        Args:
            shards: names of all shards.
            meta: more facts for the manifest, beside the identity and `count`, the number of rows.

        Raises:
            ArtefactError: shards are missing or one too many is there, by name.
        """
        if self.finished:
            return storage.read_manifest(self.path, self.artefact_type)
        # Exactly the wanted shards must be there.
        wanted = {self._file(shard).name for shard in shards}
        there = {file.name for file in self.path.glob("*.parquet")}
        if missing := sorted(wanted - there):
            raise ArtefactError(
                f"{self.path} lacks {len(missing)} of {len(wanted)} shards: "
                f"{', '.join(missing[:10])}"
            )
        if extra := sorted(there - wanted):
            raise ArtefactError(
                f"{self.path} holds shards of something else: {', '.join(extra[:10])}"
            )
        count = sum(pq.read_metadata(self.path / name).num_rows for name in wanted)
        manifest = storage.seal(
            self.path,
            artefact_type=self.artefact_type,
            meta={**(meta or {}), **self.identity, "count": count},
        )
        self.finished = True
        return manifest

    def _file(self, shard: str) -> Path:
        return self.path / f"{shard}.parquet"

    def _read_begun(self) -> Mapping[str, JSON]:
        try:
            begun = json.loads((self.path / BEGUN).read_text(encoding="utf-8"))
        except ValueError:
            begun = None
        if not isinstance(begun, dict):
            raise ArtefactError(f"{self.path / BEGUN} is damaged: delete {self.path} and run again")
        return begun

    def _check_same(self, begun: Mapping[str, JSON]) -> None:
        # Name every setting that differs, with both values.
        differing = []
        for name in {**begun, **self.identity}:
            if begun.get(name) != self.identity.get(name):
                differing.append(name)
        if differing:
            pairs = "; ".join(
                f"{n}: there {begun.get(n)!r}, now {self.identity.get(n)!r}"
                for n in sorted(differing)
            )
            raise ArtefactError(
                f"{self.path} holds something else ({pairs}): delete it or choose another place"
            )


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of columns: that of a list includes its elements."""
    result = []
    for field in schema:
        result.append(
            f"{field.name}.list.element" if pa.types.is_fixed_size_list(field.type) else field.name
        )
    return result
