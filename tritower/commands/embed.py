"""`index.py embed`: a catalogue becomes embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EmbedOptions:
    """How the model runs.

    Attributes:
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

    batch_size: int = 256
    num_workers: int = 0
    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: str = "32-true"
    feature_cache: Path | None = None
    skip_untrained: bool = False


def embed(model: Path, catalogue: Path, output: Path, options: EmbedOptions) -> int:
    """Embed a prepared catalogue: products, its queries, and tuning queries.

    A killed run is continued by the same command.

    Args:
        model: model folder, as training exports it.
        catalogue: prepared catalogue.
        output: folder to make, with products/, queries/ and tuning/ in it.
        options: how the model runs
    """
    # Imported here: torch takes seconds, and the help needs none of it.
    from tritower.towers import embedding_shards
    from tritower.towers.embed import embed as embed_catalogue

    embed_catalogue(
        model,
        catalogue,
        output,
        options=embedding_shards.EmbedOptions(
            options.batch_size,
            options.num_workers,
            options.accelerator,
            options.devices,
            options.precision,
            options.feature_cache,
        ),
        untrained=not options.skip_untrained,
    )
    print(f"embeddings: {output}")
    return 0
