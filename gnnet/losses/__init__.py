"""Losses over feature pyramids and pixel correspondences."""
