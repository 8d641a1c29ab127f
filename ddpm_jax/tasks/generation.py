"""The contract between a text-to-image system and its generation model, and the two models.

A `Generator` is trained on an autoencoder's latents under a caption's features, and draws such
latents: `diffusion` (Rombach et al. 2022) in the latent space, `autoregressive` (the line of
DALL-E: Ramesh et al. 2021) over the codes of a quantised one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion import losses as loss
from ddpm_jax.diffusion.prediction import Kind, Prediction, read
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.errors import UserError
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.sharding import Parallel
from ddpm_jax.task import Request, refuse
from ddpm_jax.tasks.autoencoder import Latents
from ddpm_jax.tasks.diffusion import step_time
from ddpm_jax.tasks.image_sampler import Sampling, check_start, drawing


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


def diffusion(
    net: UNet | DiT,
    schedule: Schedule,
    latents: Latents,
    *,
    kind: Kind = "v",
    weight: Callable[[Array], Array] = loss.one,
    sampling: Sampling,
    batch_size: int,
    draws: int = 1,
) -> Generator:
    """Denoising diffusion of latents: the loss is the mean squared error of eps, weighted.

    Args:
      net: with as many inputs and outputs as the latents have channels.
      sampling: how latents are drawn unless a request says otherwise.
      batch_size: images of a training step.
      draws: times and noises at which it sees each of them, whose caption and latents are read
        once.  Its times are 1 / draws apart, each in its own of `batch_size * draws` even parts:
        of two, a gradient varies as little as of twice as many images (variances 0.091 and 0.086,
        0.113 where an image's times are neighbours).

    Raises:
      UserError: the network cannot be built for latents of this shape, or what it predicts says
        nothing of them where drawing starts.
    """
    shape = latents.shape
    net.check(shape)

    def init(key, context: Context):
        size = len(context.mask)
        return net.init(key, jnp.zeros((size, *shape)), jnp.zeros(size), None, None, context)

    def predict(params, zt, logsnr, told, keys=None) -> Prediction:
        out: Any = net.apply(params, zt, schedule.time(logsnr), None, keys, told[0])
        return jax.vmap(functools.partial(read, kind))(out, zt, logsnr)

    draw_latents = drawing(
        predict,
        lambda params: schedule,
        shape,
        0,
        sampling,
        steps=schedule.steps,
        nothing=lambda told: (told[1], told[1]),
    )
    check_start(kind, schedule, sampling)

    def loss_of(params, z, context, index, keys, train):
        count = draws if train else 1
        if count > 1:
            keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
            index = (index[:, None] + batch_size * jnp.arange(count)).reshape(-1)
            z = z.repeat(count, 0)
        split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        times = batch_size * count
        t = loss.stratified_times(split[:, 0], index % times, times)
        logsnr = schedule.logsnr(step_time(schedule, t))
        eps = jax.vmap(lambda key: jax.random.normal(key, shape))(split[:, 1])
        zt = jax.vmap(q_sample)(z, eps, logsnr)
        found = predict(params, zt, logsnr, (context, None), split[:, 2] if train else None)
        mse = jax.vmap(loss.simple)(found, eps)
        weighted = jax.vmap(weight)(logsnr) * mse
        weighted, mse = (a.reshape(-1, count).mean(1) for a in (weighted, mse))
        return weighted, {"mse": mse}

    def draw(params, frozen, keys, context, instead, how: Sampling, spread: Parallel):
        z = draw_latents.told(params, keys, (context, instead), how, spread)
        return spread.compile(latents.decode)(frozen, z)

    return Generator(
        init, latents.encode, loss_of, draw, draw_latents.requested, sampling._asdict()
    )


class Autoregressive(NamedTuple):
    """How codes are drawn: the scale of guidance, 1: none; the temperature of the draws."""

    guidance: float = 1.0
    temperature: float = 1.0


def autoregressive(net: CodeTransformer, latents: Latents, how: Autoregressive) -> Generator:
    """p(codes | caption) = prod_i p(code_i | codes before it, caption), in rows from the top.

    The loss is -log p in nats a code.  Guidance extrapolates log p (Crowson 2021; Gafni et al.
    2022, sec. 3.4): l = l_nothing + scale (l_caption - l_nothing), before it is drawn from.

    Raises:
      UserError: the autoencoder has no codes.
    """
    rows, columns, _ = latents.shape
    if not latents.codes:
        raise UserError(
            "an autoregressive generation model needs a quantised autoencoder: give --config.codes"
        )

    def init(key, context: Context):
        return net.init(key, jnp.zeros((len(context.mask), rows * columns), jnp.int32), context)

    def loss_of(params, codes: Int[Array, "batch rows columns"], context, index, keys, train):
        del index
        codes = codes.reshape(len(codes), -1)
        logits: Any = net.apply(params, codes, context, keys if train else None)
        logs = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
        right = (logits.argmax(-1) == codes).mean(-1, dtype=jnp.float32)
        return -logs.mean(-1), {"accuracy": right}

    def draw(params, frozen, keys, context, instead, how: Autoregressive, spread: Parallel):
        scale = None if how.guidance == 1.0 else how.guidance
        arguments = (params, frozen, keys, context, instead, scale, how.temperature)
        return spread.compile(walk)(*arguments)

    def walk(params, frozen, keys, context, instead, scale, temperature):
        """Code after code; a scale of None is no guidance, which needs no second half."""
        size, guided = len(keys), scale is not None
        told = context
        if guided:
            told = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), context, instead)

        def one(codes, place):
            both = jnp.concatenate([codes, codes]) if guided else codes
            logits: Any = net.apply(params, both, told)
            logits = jax.nn.log_softmax(logits[:, place])
            if guided:
                logits = logits[size:] + scale * (logits[:size] - logits[size:])
            place_keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
            drawn = jax.vmap(jax.random.categorical)(place_keys, logits / temperature)
            return codes.at[:, place].set(drawn.astype(codes.dtype)), None

        codes = jnp.zeros((size, rows * columns), jnp.int32)
        codes, _ = jax.lax.scan(one, codes, jnp.arange(rows * columns))
        return latents.decode(frozen, latents.lay(frozen, codes.reshape(size, rows, columns)))

    def requested(request: Request) -> Autoregressive:
        refuse(request, "sampler", "steps", "label")
        return how if request.guidance is None else how._replace(guidance=request.guidance)

    return Generator(init, latents.read, loss_of, draw, requested, how._asdict())
