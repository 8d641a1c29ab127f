"""Feature networks that images are compared in: classifiers and image towers."""

import dataclasses
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.parallel.partitioner import fetch
from ddpm_jax.parallel.replicated import placed


@runtime_checkable
class Network(Protocol):
    """A network of images: a hashable value, static to `jax.jit`."""

    def __call__(self, params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
        """Return (logits, features) of images in [-1, 1]."""


def features_of(
    network: Network, params: PyTree, x: Float[Array, "batch h w c"]
) -> tuple[Array, Array]:
    """Return the features of images and log p(y|x)."""
    logits, features = network(params, x)
    return features, jax.nn.log_softmax(logits)


def feature_network(
    name: str, network: Network, params: PyTree, batch_size: int = 500
) -> FeatureNetwork:
    """Return a network as a `FeatureNetwork`, on the devices on which its parameters lie.

    Args:
      name: of the feature network.
      network: the network; equal networks share one compiled program.
      params: the network's parameters.
      batch_size: images at once.
    """

    def extract(
        images: Float[np.ndarray, "n h w c"],
    ) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n classes"]]:
        partitioner, parts = placed(params), []
        size = partitioner.round_up(batch_size)
        compiled = partitioner.compile(features_of, static_argnums=0)
        for start in range(0, len(images), size):  # one shape, compiled once
            part = np.asarray(images[start : start + size], np.float32)
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
            batch = partitioner.shard(filled[partitioner.rows(size)])
            seen = fetch(compiled(network, params, batch))
            parts.append([a.astype(np.float64)[: len(part)] for a in seen])
        features, logs = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logs)

    return FeatureNetwork(name, extract)


@dataclasses.dataclass(frozen=True)
class ClassifierFeatures:
    """A classifier of clean images.

    Attributes:
      network: The classifier's network.
    """

    network: nn.Module

    def __call__(self, params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
        """Return the logits, and the features that they are computed from."""
        logits, features = self.network.apply(params, x)
        assert isinstance(features, jax.Array)
        assert isinstance(logits, jax.Array)
        return logits, features


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """The image tower of a dual encoder, as a network of one class.

    Attributes:
      network: The dual encoder.
    """

    network: nn.Module

    def __call__(self, params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
        """Return logits of 0, and the features of images."""
        features = self.network.apply(params, x, method="embed_image")
        assert isinstance(features, jax.Array)
        return jnp.zeros((len(x), 1)), features


def image_tower(name: str, net: nn.Module, params: PyTree) -> FeatureNetwork:
    """Return the image tower of a dual encoder as a feature network with one class."""
    return feature_network(name, ImageFeatures(net), params)
