"""Guidance composes denoisers: scale 0 is unconditional, 1 conditional.

So it is with a classifier beside an unconditional denoiser, where 1 is Bayes' rule,
p(x | y) ~ p(x) p(y | x); 0 leaves the denoiser alone, whatever it is.  In autoguidance 0 is the
worse model and 1 the good one alone.

The functions are of denoisers; `Guidance` is the pytree of them that a sampler is given, whose
scale and other network's parameters are data: new scales compile nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ddpm_jax.diffusion.prediction import Denoiser, Prediction, with_x0
from ddpm_jax.diffusion.process import alpha_sigma

STATIC = {"static": True}  # of a field that is not data of a pytree

# A network with its parameters: (x_t [B, *event], logsnr [B], conditioning) -> Prediction
Predict = Callable[[Array, Array, PyTree], Prediction]


def combine(conditional: Prediction, unconditional: Prediction, scale: float | Array) -> Prediction:
    """unconditional + scale (conditional - unconditional) (Ho & Salimans 2022, eq. 6).

    Autoguidance is the same with a worse model in the second place (Karras et al. 2024).
    """
    return Prediction(
        unconditional.x0 + scale * (conditional.x0 - unconditional.x0),
        unconditional.eps + scale * (conditional.eps - unconditional.eps),
        conditional.variance_fraction,
    )


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, scale: float | Array
) -> Denoiser:
    """Return the combination of two denoisers."""
    return lambda xt, logsnr: combine(conditional(xt, logsnr), unconditional(xt, logsnr), scale)


def within_interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Return `guided` where low <= logsnr <= high, else `plain` (Kynkaanniemi et al. 2024).

    Args:
      guided, plain: denoisers of x_t [B, *event] and one logsnr for all.
      low, high: ends of the interval in logsnr, both inclusive.
    """

    def denoise(xt: Array, logsnr: Array) -> Prediction:
        inside = (low <= logsnr) & (logsnr <= high)
        prediction: Prediction = jax.lax.cond(inside, guided, plain, xt, logsnr)
        return prediction

    return denoise


def rescaled(
    guided: Prediction,
    conditional: Prediction,
    xt: Float[Array, "..."],
    logsnr: Array,
    share: float = 0.7,
) -> Prediction:
    """Return guided x0 scaled back, image by image, to the standard deviation without guidance.

    x0 = share (std_conditional / std_guided) x0 + (1 - share) x0 (Lin et al. 2024, eq. 14-16).
    An image of one value has no deviation (but for rounding) and stays as it is.

    Args:
      guided: the guided prediction.
      conditional: the prediction without guidance.
      xt: noisy data [B, *event].
      logsnr: one for all.
      share: of the standard deviation that is set back.
    """

    def rescale(x0: Array, target: Array) -> Array:
        rounding = 10 * jnp.finfo(x0.dtype).eps * jnp.abs(x0).max()
        varied, target_varied = x0.var() > jnp.square(rounding), target.var() > 0
        std = jnp.sqrt(jnp.where(varied, x0.var(), 1.0))
        target_std = jnp.where(
            target_varied, jnp.sqrt(jnp.where(target_varied, target.var(), 1)), 0
        )
        return jnp.where(varied, x0 * (share * target_std / std + 1 - share), x0)

    return with_x0(guided, jax.vmap(rescale)(guided.x0, conditional.x0), xt, logsnr)


def classifier(
    denoise: Denoiser,
    log_likelihood: Callable[[Array, Array], Float[Array, "batch"]],
    scale: float | Array,
) -> Denoiser:
    """eps - scale sigma grad_x log p(y | x_t) (Dhariwal & Nichol 2021, alg. 2).

    Args:
      log_likelihood: (xt, logsnr) -> log p(y | x_t) of each image.
    """

    def guided(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        slope = jax.grad(lambda xt: log_likelihood(xt, logsnr).sum())(xt)
        alpha, sigma = alpha_sigma(logsnr)
        x0 = prediction.x0 + scale * jnp.square(sigma) / alpha * slope
        return with_x0(prediction, x0, xt, logsnr)

    return guided


@runtime_checkable
class Method(Protocol):
    """How sampling is guided: a registered pytree.

    Attributes:
      neutral: The scale that leaves a denoiser as it is.
      scale: The scale.
    """

    neutral: ClassVar[float]

    @property
    def scale(self) -> float | Array:
        """The scale of guidance."""

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the prediction under the conditioning, and the guided one.

        Args:
          predict: the network that is guided.
          xt: [B, *event].
          logsnr: one for all.
          conditioning: what the network is given: labels, or features of captions.
          null: what an unconditional network is given in its place.
        """


@runtime_checkable
class GuidingNetwork(Protocol):
    """What predicts x0 and eps with its parameters."""

    def predict(
        self, params: PyTree, xt: Array, logsnr: Float[Array, "batch"], conditioning: PyTree
    ) -> Prediction:
        """Return the prediction of x_0 and eps.

        Args:
          params: parameters of the network.
          xt: x_t, [B, *event].
          logsnr: one for every example, [B].
          conditioning: what the network is given: labels, or features of captions.
        """


@runtime_checkable
class NoisyClassifier(Protocol):
    """A classifier of noisy images with its parameters."""

    def log_likelihood(
        self, params: PyTree, xt: Array, logsnr: Float[Array, ""], labels: Int[Array, "batch"]
    ) -> Float[Array, "batch"]:
        """Return log p(label | x_t) of each image, in nats.

        Args:
          params: parameters of the classifier.
          xt: x_t, [B, *event].
          logsnr: one for all.
          labels: [B].
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance, by the network's own conditioning (Ho & Salimans 2022).

    Attributes:
      scale: 0 is unconditional, 1 conditional.
    """

    scale: float | Array

    neutral: ClassVar[float] = 1.0

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the conditional prediction and the combination, of one doubled batch.

        Args:
          predict, xt, logsnr, conditioning, null: see `Method.predictions`.
        """
        size = len(xt)
        both = predict(
            jnp.concatenate([xt, xt]),
            jnp.full(2 * size, logsnr),
            jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditioning, null),
        )
        conditional = jax.tree.map(lambda a: a[:size], both)
        unconditional = jax.tree.map(lambda a: a[size:], both)
        return conditional, combine(conditional, unconditional, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noisy images (Dhariwal & Nichol 2021, alg. 2).

    Attributes:
      scale: 0 leaves the network alone; 1, of an unconditional one, is Bayes' rule.
      params: Parameters of the classifier.
      classifier: The classifier; the conditioning is labels.
    """

    scale: float | Array
    params: PyTree
    classifier: NoisyClassifier = dataclasses.field(metadata=STATIC)

    neutral: ClassVar[float] = 0.0

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the network's prediction and the one moved towards the labels.

        Args:
          predict, xt, logsnr, conditioning, null: see `Method.predictions`.
        """
        del null
        prediction = predict(xt, jnp.full(len(xt), logsnr), conditioning)

        def log_likelihood(xt: Array, logsnr: Array) -> Array:
            return self.classifier.log_likelihood(self.params, xt, logsnr, conditioning)

        moved = classifier(lambda *_: prediction, log_likelihood, self.scale)
        return prediction, moved(xt, logsnr)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoguidance:
    """Guidance by a worse model of the same data (Karras et al. 2024).

    Attributes:
      scale: 0 is the worse model, 1 the guided one.
      params: Parameters of the worse model.
      network: The worse model.
    """

    scale: float | Array
    params: PyTree
    network: GuidingNetwork = dataclasses.field(metadata=STATIC)

    neutral: ClassVar[float] = 1.0

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the network's prediction and its combination with the worse model's.

        Args:
          predict, xt, logsnr, conditioning, null: see `Method.predictions`.
        """
        del null
        logsnrs = jnp.full(len(xt), logsnr)
        prediction = predict(xt, logsnrs, conditioning)
        worse = self.network.predict(self.params, xt, logsnrs, conditioning)
        return prediction, combine(prediction, worse, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance of a sampler.

    Attributes:
      method: How it guides; None: there is no guidance, one call of the network a step.
      interval: (lowest, highest) logsnr between which it acts (`within_interval`); None: all.
      rescale: Share of the standard deviation of x0 that is set back (`rescaled`).
    """

    method: Method | None = None
    interval: tuple[float, float] | None = dataclasses.field(default=None, metadata=STATIC)
    rescale: float = dataclasses.field(default=0.0, metadata=STATIC)

    def denoiser(self, predict: Predict, conditioning: PyTree, null: PyTree) -> Denoiser:
        """Return the guided denoiser of a network.

        Args:
          predict: the network.
          conditioning: what it is given.
          null: what an unconditional network is given in its place.
        """
        method = self.method

        def plain(xt: Array, logsnr: Array) -> Prediction:
            return predict(xt, jnp.full(len(xt), logsnr), conditioning)

        if method is None:
            return plain

        def guided(xt: Array, logsnr: Array) -> Prediction:
            conditional, prediction = method.predictions(predict, xt, logsnr, conditioning, null)
            if self.rescale:
                return rescaled(prediction, conditional, xt, logsnr, self.rescale)
            return prediction

        return within_interval(guided, plain, *self.interval) if self.interval else guided
