"""Training losses: feature pyramids of an image pair and its pixel correspondences give a scalar."""
