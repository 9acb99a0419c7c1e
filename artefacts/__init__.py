"""Artefact folders: written once, complete or absent, with a digest per file; versions, shards and resumed work."""
