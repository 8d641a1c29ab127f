"""Feature networks that are made of a trained classifier or a trained image encoder."""

import dataclasses
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.parallel.partitioner import fetch
from ddpm_jax.parallel.replicated import partitioner_of


@runtime_checkable
class Network(Protocol):
    """A network as a hashable function, so that it can be a static argument of `jax.jit`."""

    def __call__(self, params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
        """Return the logits [B, classes] and features [B, D] of images in [-1, 1]."""


def features_of(
    network: Network, params: PyTree, x: Float[Array, "batch h w c"]
) -> tuple[Array, Array]:
    """Return the features [B, D] and log p(y|x) [B, classes] of images in [-1, 1]."""
    logits, features = network(params, x)
    return features, jax.nn.log_softmax(logits)


def feature_network(
    name: str, network: Network, params: PyTree, batch_size: int = 500
) -> FeatureNetwork:
    """Return a `FeatureNetwork` that runs on the devices on which the parameters are stored.

    Args:
      name: Name of the feature network in the names of metrics.
      network: The network. Equal networks use the same compiled program.
      params: Parameters of the network.
      batch_size: Number of images in one call of the network. It is rounded up to a multiple of the
        number of devices.
    """

    def extract(
        images: Float[np.ndarray, "n h w c"],
    ) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n classes"]]:
        partitioner, parts = partitioner_of(params), []
        size = partitioner.round_up(batch_size)
        compiled = partitioner.compile(features_of, static_argnums=0)
        for start in range(0, len(images), size):
            part = np.asarray(images[start : start + size], np.float32)
            # The last batch is padded to the same shape, so that the program compiles once.
            padded = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
            batch = partitioner.shard(padded[partitioner.rows(size)])
            outputs = fetch(compiled(network, params, batch))
            parts.append([a.astype(np.float64)[: len(part)] for a in outputs])
        features, log_probs = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(log_probs)

    return FeatureNetwork(name, extract)


@dataclasses.dataclass(frozen=True)
class ClassifierFeatures:
    """A classifier of clean images, in the form of a `Network`.

    Attributes:
      network: A Flax module that returns logits and features.
    """

    network: nn.Module

    def __call__(self, params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
        """Return the logits [B, classes] and the features [B, D], the input of the last layer."""
        logits, features = self.network.apply(params, x)
        assert isinstance(features, jax.Array)
        assert isinstance(logits, jax.Array)
        return logits, features


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """The image encoder of a dual encoder, in the form of a `Network` with a single class.

    Attributes:
      network: A Flax module that encodes text and images.
    """

    network: nn.Module

    def __call__(self, params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
        """Return (logits, embeddings) of images, as classifiers do; the logits [B, 1] are zeros."""
        features = self.network.apply(params, x, method="embed_image")
        assert isinstance(features, jax.Array)
        return jnp.zeros((len(x), 1)), features


def image_tower(name: str, net: nn.Module, params: PyTree) -> FeatureNetwork:
    """Return a feature network whose features are the image embeddings of a dual encoder."""
    return feature_network(name, ImageFeatures(net), params)
