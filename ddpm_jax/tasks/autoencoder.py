"""The task of an autoencoder whose latents a generation model is trained on.

The latents are of one of two types. Gaussian latents (Rombach et al. 2022, sec. 3.1) have a KL term
of small weight, which bounds them. Quantised latents (van den Oord et al. 2017) are vectors of a
codebook, which is trained by moving averages. `Variables.extra` contains moving averages of the
mean and the standard deviation of each latent channel. They normalise the latents, so that a
generation model is trained on latents of zero mean and unit variance.
"""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, DataInfo
from ddpm_jax.fields import BOUND, AtLeast, EvalBatch, NonNegative, RunPath, section
from ddpm_jax.metrics.averages import averages, with_error
from ddpm_jax.metrics.distances import GroupedMoments, frechet_distance
from ddpm_jax.metrics.networks import image_tower
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.reconstruction import SIDE, psnr, ssim
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.progress import log
from ddpm_jax.task import (
    AllGather,
    Context,
    Evaluate,
    Evaluation,
    LossOutput,
    Needs,
    Task,
    Variables,
)
from ddpm_jax.variational import vae, vq

QUICK_IMAGES = 512  # number of images in an evaluation during training
MOMENTS_DECAY = 0.99  # decay per step of the moving averages of the latents' moments

Latent = Float[Array, "batch rows columns d"]


@dataclasses.dataclass(frozen=True)
class Latents:
    """The encoder and the decoder of a trained autoencoder, as a generation model uses them.

    The argument `frozen` of the methods contains the variables of the trained autoencoder:
    {"params": ..., "extra": ...}.

    Attributes:
      network: The network of the autoencoder.
      codes: The number of vectors in the codebook; 0 for Gaussian latents.
    """

    network: Autoencoder
    codes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (rows, columns, channels) of the latents of one image."""
        return self.network.latent_shape

    def encode(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Latent:
        """Return the normalised latents [B, rows, columns, d] of images in [-1, 1]."""
        if self.codes:
            return self.embed_codes(frozen, self.code_indices(frozen, images))
        return self._standardize(frozen, self._encoded_mean(frozen, images))

    def decode(self, frozen: PyTree, z: Latent) -> Float[Array, "batch h w c"]:
        """Decode normalised latents [B, rows, columns, d] to images [B, H, W, C] in [-1, 1].

        If there is a codebook, each latent vector is first replaced by the nearest codebook vector.
        """
        mean, std = latent_moments(frozen["extra"])
        z = z * std + mean
        if self.codes:
            codes = frozen["extra"]["book"].codes
            z = codes[vq.nearest(z, codes)]
        decoded: PyTree = self.network.apply(frozen["params"], z, method="decode")
        return jnp.clip(decoded, -1, 1)

    def code_indices(
        self, frozen: PyTree, images: Float[Array, "batch h w c"]
    ) -> Int[Array, "batch rows columns"]:
        """Encode images in [-1, 1] to the indices of the nearest codebook vectors."""
        return vq.nearest(self._encoded_mean(frozen, images), frozen["extra"]["book"].codes)

    def embed_codes(
        self, frozen: PyTree, indices: Int[Array, "*positions"]
    ) -> Float[Array, "*positions d"]:
        """Return the normalised codebook vectors that have the given indices."""
        return self._standardize(frozen, frozen["extra"]["book"].codes[indices])

    def _encoded_mean(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Latent:
        moments: PyTree = self.network.apply(frozen["params"], images, method="encode")
        mean: Array = moments[0]
        return mean

    def _standardize(
        self, frozen: PyTree, z: Float[Array, "*positions d"]
    ) -> Float[Array, "*positions d"]:
        mean, std = latent_moments(frozen["extra"])
        return (z - mean) / std


def latent_moments(extra: PyTree) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
    """Return the mean [d] and the standard deviation [d] of the latents, one value per channel."""
    weight = jnp.maximum(extra["weight"], 1e-6)  # sum of the moving averages' weights
    mean = extra["mean"] / weight
    return mean, jnp.sqrt(jnp.maximum(extra["square"] / weight - jnp.square(mean), 1e-8))


@dataclasses.dataclass(frozen=True)
class LatentAutoencoder(Task):
    """An autoencoder whose latents a generation model is trained on.

    The loss is the mean absolute error plus the mean squared error of the pixels, plus `kl_weight`
    times the KL of Gaussian latents or `commitment_weight` times the commitment loss.

    Attributes:
      network: The network of the encoder and the decoder.
      kl_weight: Weight of KL(q(z|x) || N(0, I)), in nats per pixel and channel; it has an effect
        only if codes=0.
      codes: Number of vectors in the codebook; 0 selects Gaussian latents without a codebook.
      commitment_weight: Weight of the commitment loss, the mean squared distance between the
        encoder's output and its nearest codebook vector; it has an effect only if codes > 0.
      eval_batch_size: Number of images in one batch of an evaluation; it does not change results.
      text_encoder: Run directory of a trained text encoder; its image encoder computes the features
        for the Frechet distance of reconstructions to images. "none" leaves this metric out.
      info: Description of the data set: image shape, number of classes and caption length.
    """

    network: Autoencoder = Autoencoder()
    kl_weight: NonNegative = 1e-4
    codes: Annotated[int, AtLeast(0)] = 0
    commitment_weight: NonNegative = 0.25
    eval_batch_size: EvalBatch = 128
    text_encoder: RunPath = "none"
    info: Annotated[DataInfo, BOUND] = UNBOUND

    run_type: ClassVar[str] = "autoencoder"

    def needs(self) -> Needs:
        """Return the run of the text encoder that computes metrics, if the config names one."""
        dual = "" if self.text_encoder == "none" else self.text_encoder
        return Needs(dual_encoder=dual, dual_encoder_field="text_encoder")

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "LatentAutoencoder":
        """Return the task with its network set up for the image shape and the precision."""
        del batch_size
        network = self.network.clone(shape=info.shape, dtype=inner_dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, info=info)

    def check(self) -> None:
        """Raise FieldError if a field of the network does not fit the size of the images."""
        with section("network"):
            self.network.check()

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the initial variables, which do not depend on the batch."""
        del batch
        width = self.network.latent_channels
        net_key, code_key = jax.random.split(key)
        params = self.network.init(net_key, jnp.zeros((1, *self.network.shape)))
        extra: PyTree = {"mean": jnp.zeros(width), "square": jnp.zeros(width)}
        extra["weight"] = jnp.zeros(())
        if self.codes:
            extra["book"] = vq.codebook(jax.random.normal(code_key, (self.codes, width)))
        return Variables(params, extra)

    def latent(
        self, variables: Variables, x: Float[Array, "batch h w c"], keys: Key[Array, "batch"]
    ) -> tuple[Latent, Latent, dict[str, Float[Array, "batch"]]]:
        """Return (z, encoded, terms) for images x [B, H, W, C] in [-1, 1].

        z [B, rows, columns, d] is the input of the decoder: a sample of q(z|x), or the nearest
        codebook vectors with a straight-through gradient. encoded, of the same shape, is the mean
        of q(z|x). terms is {"kl": [B]} in nats, or {"commitment": [B]}.
        """
        moments: PyTree = self.network.apply(variables.params, x, method="encode")
        mean, logvar = moments
        if self.codes:
            codes = variables.extra["book"].codes
            quantised = codes[vq.nearest(mean, codes)]
            commitment = jax.vmap(vq.commitment)(mean, quantised)
            return vq.straight_through(mean, quantised), mean, {"commitment": commitment}
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        kl = jax.vmap(vae.kl_to_standard_normal)(mean, logvar)
        return jax.vmap(vae.reparameterize)(mean, logvar, eps), mean, {"kl": kl}

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the loss of every image: the pixel errors plus the KL or the commitment loss.

        Args:
          variables: The parameters; the extra variables are the latents' moments and codebook.
          batch: Images, labels and indices of B examples.
          keys: Random keys, one for each example, [B].
          train: Not used, since the network has no dropout.
          all_gather: Not used.
        """
        del train, all_gather
        x = to_images(batch.images, self.info.levels)
        z, encoded, metrics = self.latent(variables, x, keys)
        decoded: PyTree = self.network.apply(variables.params, z, method="decode")
        error = (decoded - x).reshape(len(x), -1)
        metrics["absolute_error"] = jnp.abs(error).mean(1)
        losses = metrics["absolute_error"] + jnp.square(error).mean(1)
        if self.codes:
            losses += self.commitment_weight * metrics["commitment"]
        else:
            losses += self.kl_weight * metrics["kl"] / np.prod(self.network.shape)
        latents = encoded.reshape(len(x), -1, self.network.latent_channels)
        return LossOutput(losses, metrics, {"z": latents})

    def update_extra(self, extra: PyTree, statistics: PyTree) -> PyTree:
        """Return the moving averages of the latents' moments and the codebook after a step."""
        z = statistics["z"].reshape(-1, self.network.latent_channels)
        batch = {"mean": z.mean(0), "square": jnp.square(z).mean(0), "weight": jnp.ones(())}
        decay = MOMENTS_DECAY
        moments = {name: decay * extra[name] + (1 - decay) * value for name, value in batch.items()}
        return {**moments, "book": vq.update(extra["book"], z)} if self.codes else moments

    def evaluations(self) -> "tuple[Evaluate[LatentAutoencoder], ...]":
        """Return the functions that compute the metrics and images of an evaluation."""
        codes = (evaluate_codes,) if self.codes else ()
        metrics = (evaluate_reconstructions, *codes, evaluate_latents, evaluate_frechet_distance)
        return *metrics, reconstruction_sheet


class Reconstructions(NamedTuple):
    """Images with their reconstructions, losses and latents.

    Attributes:
      originals: The original images [N, H, W, C] in [-1, 1].
      images: The reconstructed images [N, H, W, C] in [-1, 1].
      values: By name, "loss" and its terms [N], the latents "z" [N, rows, columns, d], and with a
        codebook the indices "codes" [N, rows * columns].
    """

    originals: Float[np.ndarray, "n h w c"]
    images: Float[np.ndarray, "n h w c"]
    values: dict[str, np.ndarray]


def reconstruct(
    task: LatentAutoencoder, variables: Variables, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the arrays in `Reconstructions.values` and "reconstruction" for every image.

    The decoder's input is not sampled: it is the mean of q(z|x), or the nearest codebook vectors.

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      variables: The parameters, and the codebook if there is one.
      batch: A batch of images.
      keys: Random keys, one for each image.
    """
    losses, metrics, _ = task.loss(
        variables, batch, keys, train=False, all_gather=lambda tree: tree
    )
    x = to_images(batch.images, task.info.levels)
    moments: PyTree = task.network.apply(variables.params, x, method="encode")
    z, values = moments[0], {"loss": losses, **metrics}
    if task.codes:
        codes = variables.extra["book"].codes
        indices = vq.nearest(z, codes)
        z = codes[indices]
        values["codes"] = indices.reshape(len(x), -1)
    decoded: PyTree = task.network.apply(variables.params, z, method="decode")
    return {"reconstruction": jnp.clip(decoded, -1, 1), "z": z, **values}


def shared_reconstructions(context: Context) -> Reconstructions:
    """Return the reconstructions of the split; during training, of its first 512 images."""
    task = context.task
    assert isinstance(task, LatentAutoencoder)
    split = context.examples(QUICK_IMAGES)
    values = context.per_example(reconstruct, split, task.eval_batch_size, context.variables)
    images = values.pop("reconstruction")
    return Reconstructions(to_images(split.images, task.info.levels), images, values)


def evaluate_reconstructions(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the loss, its terms, PSNR, and SSIM if images have at least `SIDE` x `SIDE` pixels."""
    originals, images, values = context.cached(shared_reconstructions)
    names = ("loss", "absolute_error", "commitment" if task.codes else "kl")
    metrics = {name: values[name] for name in names} | {"psnr": psnr(images, originals)}
    if min(originals.shape[1:3]) >= SIDE:
        metrics["ssim"] = ssim(images, originals)
    return Evaluation(averages(metrics), about={"images": f"{context.split} split"})


def evaluate_codes(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the share of the codebook vectors that are used, from 0 to 1, and their perplexity."""
    indices = context.cached(shared_reconstructions).values["codes"].astype(int).ravel()
    counts = np.bincount(indices, minlength=task.codes)
    perplexity = float(vq.perplexity(jnp.asarray(counts, jnp.float32)))
    return Evaluation({"codes_used": float((counts > 0).mean()), "perplexity": perplexity})


def evaluate_latents(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the standard deviation of the normalised latents, which should be near 1."""
    del task
    z = context.cached(shared_reconstructions).values["z"]
    mean, std = jax.tree.map(np.asarray, context.compile(latent_moments)(context.variables.extra))
    return Evaluation({"latent_std": float(((z - mean) / std).std())})


def evaluate_frechet_distance(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the Frechet distance of reconstructions to the originals.

    It is computed only in the final evaluation, and only if the config names a text encoder.
    """
    del task
    load = context.resources.dual_encoder
    if not context.full or load is None:
        return Evaluation()
    tower = image_tower("text_encoder", *load())
    name = f"fd_{tower.name}"
    about = {"fd": f"reconstructions against their originals, in the features of {tower.name}"}
    originals, images, _ = context.cached(shared_reconstructions)
    if len(images) < 2:
        log(f"metric {name} is left out: it needs at least 2 images, and the split has fewer")
        return Evaluation(about=about)
    plots.check_finite(images)
    sets = [GroupedMoments(tower.extract(part)[0]) for part in (images, originals)]
    distance = frechet_distance(sets[0], sets[1], paired=True)
    return Evaluation(with_error(name, distance.estimate), about=about)


def reconstruction_sheet(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return a grid of the first 40 images, with the reconstructions below each row of 10."""
    del task
    originals, images, _ = context.cached(shared_reconstructions)
    starts = range(0, min(len(originals), 40), 10)
    rows = [part[start : start + 10] for start in starts for part in (originals, images)]
    sheet = plots.image_or_error(plots.grid, np.concatenate(rows), columns=10)
    return Evaluation(images={"reconstructions": sheet})
