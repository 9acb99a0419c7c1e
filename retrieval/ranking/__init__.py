"""Ranked results: rows with scores, how good they are, and how several rankings are fused.

NumPy only.
"""
