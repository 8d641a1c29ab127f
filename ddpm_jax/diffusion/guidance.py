"""Guidance: functions that combine denoisers, and the pytree `Guidance` that samplers use.

Classifier-free guidance is eps = eps_null + scale (eps_cond - eps_null): scale 0 is unconditional,
and scale 1 is the conditional model without guidance. In autoguidance, scale 0 is the worse model
and scale 1 the guided model alone. In classifier guidance, scale 0 is the denoiser alone; if the
denoiser is unconditional, scale 1 is Bayes' rule, p(x | y) ~ p(x) p(y | x).

The guidance model is the classifier or the worse model. The guidance scale and the parameters of
the guidance model are data of the pytree, so that a new scale needs no new compilation.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ddpm_jax.diffusion.prediction import Denoiser, Prediction, with_x0
from ddpm_jax.diffusion.process import alpha_sigma

STATIC = {"static": True}  # metadata of a dataclass field that is not data of the pytree

# A network with its parameters: (x_t [B, *event], logsnr [B], conditioning) -> Prediction
Predict = Callable[[Array, Array, PyTree], Prediction]


def combine(conditional: Prediction, unconditional: Prediction, scale: float | Array) -> Prediction:
    """Return unconditional + scale (conditional - unconditional) (Ho & Salimans 2022, eq. 6).

    A learned variance is that of `conditional`. In autoguidance, `unconditional` is the prediction
    of the worse model (Karras et al. 2024).

    >>> conditional, unconditional = (Prediction(*jnp.full((2, 1), x)) for x in (1.0, 0.5))
    >>> print(combine(conditional, unconditional, 3.0).x0)
    [2.]
    """
    return Prediction(
        unconditional.x0 + scale * (conditional.x0 - unconditional.x0),
        unconditional.eps + scale * (conditional.eps - unconditional.eps),
        conditional.variance_fraction,
    )


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, scale: float | Array
) -> Denoiser:
    """Return a denoiser that combines the predictions of two denoisers by `combine`."""
    return lambda xt, logsnr: combine(conditional(xt, logsnr), unconditional(xt, logsnr), scale)


def within_interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Return a denoiser with guidance only in an interval of logsnr (Kynkaanniemi et al. 2024).

    Args:
      guided: The denoiser for low <= logsnr <= high, where logsnr is the same for all images.
      plain: The denoiser for all other logsnr.
      low: The lower end of the interval, in logsnr.
      high: The upper end of the interval, in logsnr.
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
    fraction: float = 0.7,
) -> Prediction:
    """Return the guided prediction after its x0 is rescaled towards the std of the unguided x0.

    new x0 = f (std_conditional / std_guided) x0 + (1 - f) x0, where f is `fraction` and each std
    is over the pixels of one image (Lin et al. 2024, eq. 14-16). An image whose pixels are all
    equal (up to rounding) does not change, because its std is 0.

    Args:
      guided: The prediction with guidance, [B, *event].
      conditional: The prediction without guidance, [B, *event].
      xt: The noisy data, [B, *event].
      logsnr: The log signal-to-noise ratio of x_t, the same for all images.
      fraction: The weight of the rescaled x0, from 0 (no rescaling) to 1.
    """

    def rescale(x0: Array, target: Array) -> Array:
        rounding = 10 * jnp.finfo(x0.dtype).eps * jnp.abs(x0).max()
        varied, target_varied = x0.var() > jnp.square(rounding), target.var() > 0
        std = jnp.sqrt(jnp.where(varied, x0.var(), 1.0))
        target_std = jnp.where(
            target_varied, jnp.sqrt(jnp.where(target_varied, target.var(), 1)), 0
        )
        return jnp.where(varied, x0 * (fraction * target_std / std + 1 - fraction), x0)

    return with_x0(guided, jax.vmap(rescale)(guided.x0, conditional.x0), xt, logsnr)


def classifier(
    denoise: Denoiser,
    log_likelihood: Callable[[Array, Array], Float[Array, "batch"]],
    scale: float | Array,
) -> Denoiser:
    """Return a denoiser with classifier guidance (Dhariwal & Nichol 2021, alg. 2).

    eps = eps_hat - scale sigma grad_x log p(y | x_t)

    Args:
      denoise: The denoiser without guidance.
      log_likelihood: A function (x_t, logsnr) -> log p(y | x_t) of each image, [B], in nats.
      scale: The guidance scale; 0 turns guidance off.
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
    """A guidance method, whose class must be registered as a pytree.

    Attributes:
      neutral: The guidance scale at which guidance does not change the prediction.
      scale: The guidance scale.
    """

    neutral: ClassVar[float]

    @property
    def scale(self) -> float | Array:
        """The guidance scale."""

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the prediction without guidance and the prediction with guidance.

        Args:
          predict: The guided network, a function (x_t, logsnr [B], conditioning) -> prediction.
          xt: The noisy images x_t, [B, *event].
          logsnr: The log signal-to-noise ratio of x_t, the same for all images.
          conditioning: The conditioning of the network: labels [B], or features of captions.
          null: The conditioning for unconditional predictions, shaped like `conditioning`.
        """


@runtime_checkable
class GuidingNetwork(Protocol):
    """The interface of a worse model for autoguidance, which predicts x0 and eps."""

    def predict(
        self, params: PyTree, xt: Array, logsnr: Float[Array, "batch"], conditioning: PyTree
    ) -> Prediction:
        """Return the prediction of x0 and eps.

        Args:
          params: The parameters of the network.
          xt: The noisy images x_t, [B, *event].
          logsnr: The log signal-to-noise ratio of each image, [B].
          conditioning: The conditioning of the network: labels [B], or features of captions.
        """


@runtime_checkable
class NoisyClassifier(Protocol):
    """The interface of a classifier of noisy images x_t."""

    def log_likelihood(
        self, params: PyTree, xt: Array, logsnr: Float[Array, ""], labels: Int[Array, "batch"]
    ) -> Float[Array, "batch"]:
        """Return log p(label | x_t) of each image, in nats.

        Args:
          params: The parameters of the classifier.
          xt: The noisy images x_t, [B, *event].
          logsnr: The log signal-to-noise ratio of x_t, the same for all images.
          labels: The class of each image, [B].
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022).

    Attributes:
      scale: The guidance scale: 0 is unconditional, 1 is conditional without guidance.
    """

    scale: float | Array

    neutral: ClassVar[float] = 1.0

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the conditional prediction without guidance and the guided prediction.

        Args:
          predict: The network, which is called once, with a batch of twice the size.
          xt: The noisy images x_t, [B, *event].
          logsnr: The log signal-to-noise ratio of x_t, the same for all images.
          conditioning: The conditioning of the network, such as labels [B].
          null: The conditioning for unconditional predictions, shaped like `conditioning`.
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
      scale: The guidance scale: 0 is the network alone; 1 is Bayes' rule if the network is
        unconditional.
      params: The parameters of the classifier.
      classifier: The classifier of noisy images.
    """

    scale: float | Array
    params: PyTree
    classifier: NoisyClassifier = dataclasses.field(metadata=STATIC)

    neutral: ClassVar[float] = 0.0

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the prediction without guidance and the prediction with guidance.

        Args:
          predict: The guided network, a function (x_t, logsnr [B], conditioning) -> prediction.
          xt: The noisy images x_t, [B, *event].
          logsnr: The log signal-to-noise ratio of x_t, the same for all images.
          conditioning: The labels, [B], of the network and the classifier.
          null: Null conditioning, which this method does not use.
        """
        del null
        prediction = predict(xt, jnp.full(len(xt), logsnr), conditioning)

        def log_likelihood(xt: Array, logsnr: Array) -> Array:
            return self.classifier.log_likelihood(self.params, xt, logsnr, conditioning)

        guided = classifier(lambda *_: prediction, log_likelihood, self.scale)
        return prediction, guided(xt, logsnr)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoguidance:
    """Guidance by a worse model of the same data (Karras et al. 2024).

    Attributes:
      scale: The guidance scale: 0 is the worse model alone, 1 is the guided model alone.
      params: The parameters of the worse model.
      network: The worse model.
    """

    scale: float | Array
    params: PyTree
    network: GuidingNetwork = dataclasses.field(metadata=STATIC)

    neutral: ClassVar[float] = 1.0

    def predictions(
        self, predict: Predict, xt: Array, logsnr: Array, conditioning: PyTree, null: PyTree
    ) -> tuple[Prediction, Prediction]:
        """Return the prediction without guidance and the prediction with guidance.

        Args:
          predict: The guided network, a function (x_t, logsnr [B], conditioning) -> prediction.
          xt: The noisy images x_t, [B, *event].
          logsnr: The log signal-to-noise ratio of x_t, the same for all images.
          conditioning: The conditioning of both networks, such as labels [B].
          null: Null conditioning, which this method does not use.
        """
        del null
        logsnrs = jnp.full(len(xt), logsnr)
        prediction = predict(xt, logsnrs, conditioning)
        worse = self.network.predict(self.params, xt, logsnrs, conditioning)
        return prediction, combine(prediction, worse, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guidance that a sampler uses.

    Attributes:
      method: The guidance method. If None, sampling has no guidance.
      interval: The lowest and the highest logsnr at which guidance is applied. If None, guidance
        is applied at every logsnr.
      rescale: The weight of the rescaled prediction, from 0 (no rescaling) to 1 (see `rescaled`).
    """

    method: Method | None = None
    interval: tuple[float, float] | None = dataclasses.field(default=None, metadata=STATIC)
    rescale: float = dataclasses.field(default=0.0, metadata=STATIC)

    def denoiser(self, predict: Predict, conditioning: PyTree, null: PyTree) -> Denoiser:
        """Return a denoiser that applies this guidance to the predictions of a network.

        Args:
          predict: The guided network, a function (x_t, logsnr [B], conditioning) -> prediction.
          conditioning: The conditioning of the network: labels [B], or features of captions.
          null: The conditioning for unconditional predictions, shaped like `conditioning`.
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
