"""The tasks, their evaluations, and the sampling of images that they share."""
