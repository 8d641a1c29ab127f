"""Parallel training: partitioning of arrays and training steps across devices and processes."""

PARALLEL = ["jit", "pmap", "fsdp"]  # allowed values of --parallel
