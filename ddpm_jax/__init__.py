"""Variational autoencoders, denoising diffusion and text-to-image generation in JAX."""

__version__ = "0.1.0"
