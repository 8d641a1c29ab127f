"""Variational autoencoders, denoising diffusion and text-to-image generation in JAX.

Load a trained run from its directory and sample 16 images [16, H, W, C] in [-1, 1]:

    run = ddpm_jax.load_run("runs/ddpm_digits")
    images = run.sample(16, seed=0)
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_run"]


def __getattr__(name: str) -> Any:
    """Import `load_run` when it is first used; importing the package alone does not import jax."""
    if name == "load_run":
        return importlib.import_module("ddpm_jax.experiment.load").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
