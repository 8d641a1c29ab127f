"""A generation model over the codes of a quantised autoencoder (Ramesh et al. 2021)."""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ddpm_jax.fields import MAY_CHANGE, AtLeast, FieldError, section
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.layers import Context
from ddpm_jax.parallel.sharding import Parallel
from ddpm_jax.task import Request, refuse
from ddpm_jax.tasks.autoencoder import Latents
from ddpm_jax.tasks.generation import Generator


@dataclasses.dataclass(frozen=True)
class CodeSampling:
    """How codes are drawn: the scale of guidance, 1: none; the temperature of the draws."""

    guidance: float = 1.0
    temperature: float = 1.0


def autoregressive(net: CodeTransformer, latents: Latents, how: CodeSampling) -> Generator:
    """p(codes | caption) = prod_i p(code_i | codes before it, caption), in rows from the top.

    The loss is -log p in nats a code.  Guidance extrapolates log p (Crowson 2021; Gafni et al.
    2022, sec. 3.4): l = l_nothing + scale (l_caption - l_nothing), before it is drawn from.

    Raises:
      FieldError: the autoencoder has no codes.
    """
    rows, columns, _ = latents.shape
    if not latents.codes:
        raise FieldError(
            "network.codes=0: the autoregressive generation model needs a quantised autoencoder, "
            "trained with task.codes=256"
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

    def draw(params, frozen, keys, context, instead, how: CodeSampling, spread: Parallel):
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

    def requested(request: Request) -> CodeSampling:
        refuse(request, "sampler", "steps", "label")
        return (
            how if request.guidance is None else dataclasses.replace(how, guidance=request.guidance)
        )

    return Generator(init, latents.read, loss_of, draw, requested, dataclasses.asdict(how))


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """A generation model over the codes of a quantised autoencoder; see `autoregressive`.

    Attributes:
      network: The transformer over codes.
      guidance: Scale of guidance; 1: none.
      temperature: Temperature of the sampled codes.
    """

    network: CodeTransformer = CodeTransformer()
    guidance: Annotated[float, MAY_CHANGE] = 1.0
    temperature: Annotated[float, AtLeast(1e-3), MAY_CHANGE] = 1.0

    def bind(self, autoencoder: Autoencoder, codes: int, precision: str) -> "Autoregressive":
        """Return the generation model for the codes of an autoencoder."""
        del autoencoder
        network = self.network.clone(codes=codes, dtype=jnp.dtype(precision), parent=None)
        return dataclasses.replace(self, network=network)

    def build(self, latents: Latents, batch_size: int) -> Generator:
        """Return the functions of the bound generation model.

        Raises:
          FieldError: the network cannot be built, or the autoencoder has no codes.
        """
        del batch_size
        with section("network"):
            self.network.check()
        return autoregressive(self.network, latents, CodeSampling(self.guidance, self.temperature))
