"""Dataset layouts on disk, each read into one value: `Scene`."""
