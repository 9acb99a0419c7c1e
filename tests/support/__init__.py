"""What several tests use: catalogues, vectors, models and faults made by code."""
