"""Metrics of samples, reconstructions and likelihoods, computed in float64 on the host."""
