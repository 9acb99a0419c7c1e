"""What is known about products: the prepared catalogue, and the attribute table of an index."""
