"""Side-by-side measurements; each prints one table.

Run from a checkout: `python -m benchmarks.NAME`.
"""
