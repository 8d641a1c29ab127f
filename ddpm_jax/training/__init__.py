"""The training loop, its state, checkpoints and run directories."""
