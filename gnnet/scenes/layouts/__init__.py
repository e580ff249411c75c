"""One reader a dataset layout: folders to a `Scene`."""
