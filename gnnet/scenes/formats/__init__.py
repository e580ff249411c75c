"""One module a file format: bytes to values, and nothing of any dataset."""
