"""Methods compared on the same rows: learning rates, then seeds, then a table."""
