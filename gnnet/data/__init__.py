"""From a Scene to batches: correspondence pairs for training, query and reference for localization."""
