"""Poses, cameras and sub-pixel sampling; plain tensors, any leading batch shape."""
