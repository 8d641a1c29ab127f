"""Train, evaluate and sample one experiment."""
