"""Measure what an index and a model find, beside search without training."""
