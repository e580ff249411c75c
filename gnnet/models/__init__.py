"""Networks from images to feature pyramids, and every way to load their weights."""
