"""What a dataset holds, how exact its correspondences are, and whether it can be trained on."""
