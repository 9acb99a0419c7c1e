"""Searches restricted by filters, exclusions and grouping."""
