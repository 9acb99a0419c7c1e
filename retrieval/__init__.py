"""From embeddings to hits: artefact folders, the index, metrics and reports. Needs no torch."""
