"""Distances between sets of images, in the features of some network; float64 on the host."""
