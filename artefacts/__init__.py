"""Artefact folders: written once, complete or absent, with a digest per file.

Versions, shards and resumed work.
"""
