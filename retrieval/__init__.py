"""From vectors to hits.

Open an index, search it, and what builds, updates, evaluates and shows it. Needs no torch.
"""
