"""The contract between training and everything that is trained, and the tasks themselves.

A `Task` is pure functions of (params, fixed, ...): `fixed` holds what is carried along but
not trained by gradients.  It compiles nothing itself: `spread.compile` does, which states where
all results lie.  The loop in `training/loop.py` sees nothing else.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.errors import NonFinite, UserError


class Request(NamedTuple):
    """What `--mode=sample` asks for, besides how many; None: the task's own choice."""

    label: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


class Evaluation(NamedTuple):
    """What an evaluation found: figures and pictures by name.

    The caller puts the split before the name of a figure, as in "test/loss".

    A picture is uint8 [H, W, C], a movie [F, H, W, C], or an error in the place of one whose
    values are not finite (`plots.attempt`).  `about` says what figures cannot: how
    images were drawn, what they were compared with.
    """

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray | NonFinite]
    about: dict[str, Any] = {}  # noqa: RUF012


class Guide(NamedTuple):
    """What a trained network does to another's denoiser.

    kind: "classifier" (classifier guidance) or "diffusion" (autoguidance)
    guided(params, denoise, labels, scale) -> Denoiser; label `classes` is "no class"
    shape: of images
    classes: that it is told of; 0: none
    params: its own, and about: which it is, for the record; once it is loaded
    """

    kind: Literal["classifier", "diffusion"]
    guided: Callable[[Any, Denoiser, Any, float | Array], Denoiser]
    shape: tuple[int, int, int]
    classes: int
    params: Any = None
    about: str = ""

    @property
    def nothing(self) -> float:
        """The scale that leaves a denoiser as it is."""
        return 0.0 if self.kind == "classifier" else 1.0


class Variables(NamedTuple):
    """What a trained task computes with: parameters, and what is not differentiated."""

    params: Any
    extra: Any


class Task(NamedTuple):
    """What is trained.

    init(key, batch) -> (params, fixed); `batch` holds training examples, for layers whose
        first values depend on the data.
    loss(params, fixed, batch, keys, *, train, gather)
        -> (Float[B], {name: Float[B]}, statistics), one value for each example.  A batch may be
        a device's or a part; `gather` makes the whole of an array [B, ...], or says that it
        cannot, for losses that compare examples.
    update(fixed, statistics) -> fixed, of the whole batch's statistics
    evaluate(params, fixed, data, *, split, seed, full, spread) -> Evaluation of the images of
        `split`, "validation" or "test"; quick during training, `full` at its end.  Its "loss" is
        the mean of `loss` over them, without dropout, augmentation and dropped labels; on
        validation images it decides which checkpoint is the best.  Every metric that `loss`
        returns, too, is the same quantity under the same name; another quantity has its own.
    sample(params, fixed, keys, request, spread=None) -> images [B, H, W, C] in [-1, 1], on the
        devices of `spread`; None: on those of `params`
    guide: how the trained one guides what others draw, if it can
    labels(keys, request) -> the class [B] of each image that `sample` makes, or None; None: images
        have no classes
    load(fixed) -> fixed of a new run, with what others trained before in the place of zeros; None:
        nothing is loaded
    sees: how many training examples `init` sees
    denoiser(params, labels, request) -> what sampling walks with: (x_t [B, H, W, C], logsnr) ->
        Prediction, guided and with x0 in its range; None: the task has no denoiser
    """

    init: Callable[..., tuple[Any, Any]]
    loss: Callable[..., tuple[Any, dict[str, Any], Any]]
    update: Callable[[Any, Any], Any]
    evaluate: Callable[..., Evaluation]
    sample: Callable[..., Any]
    guide: Guide | None = None
    load: Callable[[Any], Any] | None = None
    sees: int = 1
    labels: Callable[..., Any] | None = None
    denoiser: Callable[..., Denoiser] | None = None


def class_labels(labels: Any, classes: int) -> Any:
    """The labels of a class-conditional network: `classes`, "no class", in the place of -1."""
    return jnp.where(labels < 0, classes, labels)


def refuse(request: Request, *names: str) -> None:
    """A flag that means nothing to a task is said, not ignored.

    Raises:
      UserError: the request sets one of the fields `names`.
    """
    for name in names:
        if getattr(request, name) is not None:
            raise UserError(f"--{name} means nothing to this run; leave it out")


class Resources(NamedTuple):
    """What a task is given that lies in other runs; by default, nothing.

    Attributes:
      features: Functions that load the networks in whose features samples are compared.
      guidance: Loads the model that guides sampling; None of it: the labels guide.
      parts: Loads the parameters of the frozen parts that a new run starts from.
      dual_encoder: Loads (network, parameters) of the dual encoder of the evaluation.
    """

    features: tuple[Callable[[], Any], ...] = ()
    guidance: Callable[[], Guide | None] = lambda: None
    parts: Callable[[], Any] | None = None
    dual_encoder: Callable[[], Any] | None = None


class Needs(NamedTuple):
    """Names of other runs that a task's settings hold.

    Attributes:
      features: Feature networks: classifiers' experiments or runs, and inception.
      guidance_model: Run that guides sampling; "labels": none.
      text_encoder: Run of the text encoder that the task is built on; "": none.
      autoencoder: Run of the autoencoder that the task is built on; "": none.
      dual_encoder: Run of the text encoder that computes metrics, with its image tower; "": none.
      dual_encoder_field: Path of the field that names it, within the section `task`.
    """

    features: tuple[str, ...] = ()
    guidance_model: str = "labels"
    text_encoder: str = ""
    autoencoder: str = ""
    dual_encoder: str = ""
    dual_encoder_field: str = ""
