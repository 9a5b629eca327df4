"""Compares methods on the same rows: first learning rates, then seeds, then a table."""
