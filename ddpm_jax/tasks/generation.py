"""The contract between a text-to-image system and its generation model, and the two models.

A `Generator` is trained on an autoencoder's latents under a caption's features, and draws such
latents: `diffusion` (Rombach et al. 2022) in the latent space, `autoregressive` (the line of
DALL-E: Ramesh et al. 2021) over the codes of a quantised one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from ddpm_jax.task import Request


class Generator(NamedTuple):
    """A generation model.

    init(key, context) -> params
    target(frozen autoencoder, images) -> what is generated: latents or codes
    loss(params, target, context, batch index, keys, train) -> (Float[B], {name: Float[B]})
    draw(params, frozen autoencoder, keys, context, instead, how, spread) -> images; `instead` is
        what guidance leads away from: the empty caption's features, or a negative prompt's
    requested(request) -> how; raises UserError for flags that mean nothing to it
    about: how it draws by default, for the record
    """

    init: Callable[..., Any]
    target: Callable[[Any, Any], Any]
    loss: Callable[..., tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]]
    draw: Callable[..., Float[Array, "batch h w c"]]
    requested: Callable[[Request], Any]
    about: dict[str, Any]
