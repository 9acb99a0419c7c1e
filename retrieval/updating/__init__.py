"""How the next version of an index comes from the one before, and when a new build is better."""
