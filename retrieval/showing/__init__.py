"""Hits and indexes as tables, JSON and HTML pages."""
