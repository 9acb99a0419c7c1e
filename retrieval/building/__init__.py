"""How an index is chosen, trained, filled and tuned."""
