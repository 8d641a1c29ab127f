"""Feature networks that images are compared in: classifiers and image towers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddpm_jax.parallel.sharding import fetch, placed


class Judge(NamedTuple):
    """A trained classifier: `see` maps images [N, H, W, C] in [-1, 1] to (features, log p(y|x)).

    `name` is what a distance in its features is called after; `about` says which network it is.
    """

    name: str
    see: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    about: str = ""


def judge_of(
    name: str,
    network: Callable[[Any, Float[Array, "batch h w c"]], tuple[Array, Array]],
    params: Any,
    batch_size: int = 500,
) -> Judge:
    """The judge that `network(params, images in [-1, 1]) -> (logits, features)` makes.

    It works on the devices on which `params` lie.
    """

    def forward(params, x):
        logits, features = network(params, x)
        return features, jax.nn.log_softmax(logits)

    def see(images):
        spread, found = placed(params), []
        size, compiled = spread.round_up(batch_size), spread.compile(forward)
        for start in range(0, len(images), size):  # one shape, compiled once
            part = np.asarray(images[start : start + size], np.float32)
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
            seen = fetch(compiled(params, spread.shard(filled[spread.rows(size)])))
            found.append([a.astype(np.float64)[: len(part)] for a in seen])
        features, logs = zip(*found, strict=True)
        return np.concatenate(features), np.concatenate(logs)

    return Judge(name, see)


def image_judge(name: str, net: Any, params: Any) -> Judge:
    """The judge in whose features, the image tower's, distances are told; it knows one class."""

    def network(params, x):
        features = net.apply(params, x, method="of_image")
        return jnp.zeros((len(x), 1)), features

    return judge_of(name, network, params)
