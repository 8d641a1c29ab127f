"""The denoising networks; a new one is added to `DenoisingNetwork`, for all tasks."""

from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet

DenoisingNetwork = UNet | DiT
