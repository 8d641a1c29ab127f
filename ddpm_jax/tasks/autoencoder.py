"""The decoder's task: an autoencoder whose latents a generation model is trained on.

Two kinds. Gaussian (Rombach et al. 2022, sec. 3.1): a KL of tiny weight keeps the latents from
growing. Quantised (van den Oord et al. 2017): the latents are codes of a codebook, which moving
averages train. Either way the latents' mean and deviation, channel by channel, are carried beside
the weights, so that what a generation model sees has unit variance.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, AtLeast, EvalBatch, NonNegative, RunPath, section
from ddpm_jax.metrics.averages import averages, figures
from ddpm_jax.metrics.distances import Grouped, frechet_distance
from ddpm_jax.metrics.features import Judge, image_judge
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.reconstruction import SIDE, psnr, ssim
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.parallel.sharding import fetch
from ddpm_jax.progress import tell
from ddpm_jax.task import Evaluation, Needs, Resources, Task
from ddpm_jax.variational import vae, vq

QUICK_IMAGES = 512  # test images that an evaluation before the last looks at
KEEP = 0.99  # of the latents' moving moments


class Latents(NamedTuple):
    """A trained autoencoder, for what is trained on its latents; `frozen` is its parameters.

    encode(frozen, images in [-1, 1]) -> z [B, *shape], of unit variance
    decode(frozen, z) -> images in [-1, 1]
    codes: of its codebook; 0: its latents are no codes.  Of codes:
    read(frozen, images) -> codes [B, rows, columns];  lay(frozen, codes) -> z
    """

    shape: tuple[int, int, int]
    encode: Callable[[Any, Any], Float[Array, "batch rows columns d"]]
    decode: Callable[[Any, Any], Float[Array, "batch h w c"]]
    codes: int
    read: Callable[[Any, Any], Int[Array, "batch rows columns"]]
    lay: Callable[[Any, Any], Float[Array, "batch rows columns d"]]


def autoencoder_task(
    net: Autoencoder,
    levels: int,
    *,
    kl_weight: float = 1e-4,
    codes: int = 0,
    commitment: float = 0.25,
    eval_batch: int = 128,
    judge: Callable[[], Judge | None] = lambda: None,
) -> Task:
    """Mean absolute and squared error of pixels, and what keeps the latents in bounds.

    Args:
      levels: of grey in the images.
      kl_weight: of KL(q(z|x) || N(0, I)), in nats a pixel and channel.
      codes: of the codebook; 0: Gaussian latents.
      commitment: of eq. (3) of `vq.py`.
      judge: loads that in whose features a Frechet distance is told; None: there is none.

    Raises:
      FieldError: the network cannot be built for images of this size.
    """
    with section("network"):
        net.check()
    width = net.latent_channels

    def init(key, batch: Batch):
        net_key, code_key = jax.random.split(key)
        params = net.init(net_key, jnp.zeros((1, *net.shape)))
        fixed: Any = {"mean": jnp.zeros(width), "square": jnp.zeros(width), "weight": jnp.zeros(())}
        if codes:
            fixed["book"] = vq.codebook(jax.random.normal(code_key, (codes, width)))
        return params, fixed

    def latent(params, fixed, x, keys):
        """(z that is decoded, z as it is encoded, {name: nats or error of each image})."""
        mean, logvar = net.apply(params, x, method="encode")
        if codes:
            book = fixed["book"].codes
            quantised = book[vq.nearest(mean, book)]
            told = {"commitment": jax.vmap(vq.commitment)(mean, quantised)}
            return vq.straight_through(mean, quantised), mean, told
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        told = {"kl": jax.vmap(vae.kl_to_standard_normal)(mean, logvar)}
        return jax.vmap(vae.reparameterize)(mean, logvar, eps), mean, told

    def loss(params, fixed, batch, keys, *, train, gather):
        del train, gather
        x = to_images(batch.images, levels)
        z, encoded, told = latent(params, fixed, x, keys)
        off = (net.apply(params, z, method="decode") - x).reshape(len(x), -1)
        told["absolute_error"] = jnp.abs(off).mean(1)
        apart = told["absolute_error"] + jnp.square(off).mean(1)
        if codes:
            apart += commitment * told["commitment"]
        else:
            apart += kl_weight * told["kl"] / np.prod(net.shape)
        places = encoded.reshape(len(x), -1, width)
        return apart, told, {"z": places}

    def update(fixed, statistics):
        z = statistics["z"].reshape(-1, width)
        seen = {"mean": z.mean(0), "square": jnp.square(z).mean(0), "weight": jnp.ones(())}
        moved = {name: KEEP * fixed[name] + (1 - KEEP) * value for name, value in seen.items()}
        return {**moved, "book": vq.update(fixed["book"], z)} if codes else moved

    def again(params, fixed, batch, keys):
        """The loss, its parts, and the image of what a generation model is trained on."""
        x = to_images(batch.images, levels)
        apart, told, _ = loss(params, fixed, batch, keys, train=False, gather=None)
        z, _ = net.apply(params, x, method="encode")  # of Gaussian latents the mean
        seen = {"loss": apart, **told}
        if codes:
            numbers = vq.nearest(z, fixed["book"].codes)
            z = fixed["book"].codes[numbers]
            seen["codes"] = numbers.reshape(len(x), -1)
        return {"again": jnp.clip(net.apply(params, z, method="decode"), -1, 1), "z": z, **seen}

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        held_out = data.part(split) if full else data.part(split).first(QUICK_IMAGES)
        found = per_example(again, held_out, eval_batch, seed, spread, params, fixed)
        x, drawn = to_images(held_out.images, levels), found["again"]
        names = ("loss", "absolute_error", "commitment" if codes else "kl")
        values = {name: found[name] for name in names} | {"psnr": psnr(drawn, x)}
        if min(x.shape[1:3]) >= SIDE:
            values["ssim"] = ssim(drawn, x)
        metrics = averages(values)
        if codes:
            used = np.bincount(found["codes"].astype(int).ravel(), minlength=codes)
            metrics["codes_used"] = float((used > 0).mean())
            metrics["perplexity"] = float(vq.perplexity(jnp.asarray(used, jnp.float32)))
        shift, scale = fetch(spread.compile(_standard)(fixed))
        metrics["latent_deviation"] = float(((found["z"] - shift) / scale).std())
        about = {"images": f"{split} split"}
        judging = judge() if full else None
        if judging is not None:
            name = f"fd_{judging.name}"
            about["fd"] = f"of reconstructions to their originals, in {judging.name}'s features"
            if len(x) < 2:
                tell(f"left out, since it needs at least 2 images: {name}")
            else:
                plots.check_finite(drawn)
                redrawn, originals = (Grouped(judging.see(images)[0]) for images in (drawn, x))
                distance = frechet_distance(redrawn, originals, paired=True)
                metrics |= figures(name, (distance.value, distance.error))
        rows = [part[at : at + 10] for at in range(0, min(len(x), 40), 10) for part in (x, drawn)]
        sheet = plots.attempt(plots.grid, np.concatenate(rows), columns=10)
        return Evaluation(metrics, {"reconstructions": sheet}, about)

    def sample(params, fixed, keys, request, spread=None):
        raise UserError(
            "an autoencoder for latents draws nothing by itself; train a generation model on it"
        )

    return Task(init, loss, update, evaluate, sample)


def _standard(fixed: Any) -> tuple[Array, Array]:
    """The latents' mean and deviation, channel by channel."""
    weight = jnp.maximum(fixed["weight"], 1e-6)  # of all batches so far
    mean = fixed["mean"] / weight
    return mean, jnp.sqrt(jnp.maximum(fixed["square"] / weight - jnp.square(mean), 1e-8))


def latents(net: Autoencoder, codes: int) -> Latents:
    """What a trained autoencoder offers; its `frozen` is {"params": ..., "fixed": ...}."""

    def standardise(frozen, z):
        mean, deviation = _standard(frozen["fixed"])
        return (z - mean) / deviation

    def mean_of(frozen, x):
        return net.apply(frozen["params"], x, method="encode")[0]

    def encode(frozen, x):
        return lay(frozen, read(frozen, x)) if codes else standardise(frozen, mean_of(frozen, x))

    def decode(frozen, z):
        mean, deviation = _standard(frozen["fixed"])
        z = z * deviation + mean
        if codes:  # the nearest code's image, whatever was drawn
            book = frozen["fixed"]["book"].codes
            z = book[vq.nearest(z, book)]
        return jnp.clip(net.apply(frozen["params"], z, method="decode"), -1, 1)

    def read(frozen, x):
        return vq.nearest(mean_of(frozen, x), frozen["fixed"]["book"].codes)

    def lay(frozen, numbers):
        return standardise(frozen, frozen["fixed"]["book"].codes[numbers])

    return Latents(net.latent_shape, encode, decode, codes, read, lay)


def _tower_of(load: Callable[[], Any] | None) -> Judge | None:
    """The image tower of a dual encoder, in whose features images are compared."""
    return image_judge("text_encoder", *load()) if load else None


@dataclasses.dataclass(frozen=True)
class LatentAutoencoder:
    """An autoencoder whose latents a generation model is trained on; see `autoencoder_task`.

    Attributes:
      network: Encoder and decoder.
      kl_weight: Weight of KL(q(z|x) || N(0, I)), in nats per pixel and channel; of Gaussian
        latents.
      codes: Codes of the codebook; 0: Gaussian latents.
      commitment_weight: Weight of the commitment loss (`variational.vq`, eq. 3); of codes.
      eval_batch_size: Images of one batch of an evaluation.
      text_encoder: Run directory of a text encoder in whose image tower's features reconstructions
        are compared with images; none: no such metric.
      info: The data set.
    """

    network: Autoencoder = Autoencoder()
    kl_weight: NonNegative = 1e-4
    codes: Annotated[int, AtLeast(0)] = 0
    commitment_weight: NonNegative = 0.25
    eval_batch_size: EvalBatch = 128
    text_encoder: RunPath = "none"
    info: Annotated[DataInfo, BOUND] = UNBOUND

    provides: ClassVar[str] = "autoencoder"

    def needs(self) -> Needs:
        """Return the names of other runs: a text encoder that computes metrics."""
        dual = "" if self.text_encoder == "none" else self.text_encoder
        return Needs(dual_encoder=dual, dual_encoder_field="text_encoder")

    def fit_to(self, data: Data) -> "LatentAutoencoder":
        """Return the settings as they fit a data set: as they are."""
        del data
        return self

    def adapt(self, data: Data) -> Data:
        """Return the data as the task is trained on them: as they are."""
        return data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "LatentAutoencoder":
        """Return the task for a data set and a precision."""
        del batch_size
        network = self.network.clone(shape=info.shape, dtype=inner_dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, info=info)

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task.

        Raises:
          FieldError: the network cannot be built for images of this size.
        """
        return autoencoder_task(
            self.network,
            self.info.levels,
            kl_weight=self.kl_weight,
            codes=self.codes,
            commitment=self.commitment_weight,
            eval_batch=self.eval_batch_size,
            judge=functools.partial(_tower_of, resources.dual_encoder),
        )
