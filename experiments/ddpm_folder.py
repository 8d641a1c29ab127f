"""Denoising diffusion of one's own images: a folder of them, all of one size.

    python launch.py --experiment=ddpm_folder --config.data=folder:PATH

Sub-folders are labels (README, "Own data"); a folder without any gives an unconditional model.
With labels, drawn images are judged by a classifier that is trained once on the same folder, and
metrics are named after it: `fd_classifier_folder_birds` for a folder `birds`.
Images must divide by 4: 32x32 colour images are what the network's size is meant for.
"""

import dataclasses

from ddpm_jax.fields import Count, Length, Share
from experiments import ddpm_mnist

DEBUG = ddpm_mnist.DEBUG
prepare, pretrain, build = ddpm_mnist.prepare, ddpm_mnist.pretrain, ddpm_mnist.build


@dataclasses.dataclass(frozen=True)
class Config(ddpm_mnist.Config):
    """See `python launch.py --experiment=ddpm_folder --help`."""

    data: str = "folder:images"
    flip: bool = True
    dropout: Share = 0.1
    draw: Length = 1000
    channels: Count = 48
