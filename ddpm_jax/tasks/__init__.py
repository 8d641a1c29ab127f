"""One file per task, and the sampling of images that they share."""
