"""Build an index: choose, train, encode and write it."""
