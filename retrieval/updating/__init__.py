"""The next version of an index from the previous one, and whether a rebuild would be better."""
