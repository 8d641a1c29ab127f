"""Parallelism: training steps and arrays partitioned across devices and processes."""

PARALLEL = ["jit", "pmap", "fsdp"]  # values of --parallel
