"""Our index beside its peers, on the same vectors, with the same threads, at equal recall."""
