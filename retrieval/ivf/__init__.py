"""The IVF-PQ index itself.

Spec, clustering, codes, inverted lists, and the engine that searches them.
"""
