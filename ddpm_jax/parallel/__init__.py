"""How a step is spread over devices and processes."""

PARALLEL = ["jit", "pmap", "fsdp"]  # values of --parallel: how a step is spread over devices
