"""Report config fields that the user set and that have no effect or contradict other fields."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeAlias

from ddpm_jax.config import Setting, values_by_path
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.experiment.types import AnyConfig, Config, Sweep

Values: TypeAlias = dict[str, Setting]  # values of a config's fields by their paths


class NoEffect(NamedTuple):
    """A condition under which a field has no effect.

    Attributes:
      path: Path of the field.
      when: Function (values by path, number of classes) -> True if the field has no effect.
      reason: Why the field has no effect, and what to do.
    """

    path: str
    when: Callable[[Values, int], bool]
    reason: str


def _no_labels(values: Values, classes: int) -> bool:
    guided = values.get("task.sampling.guidance_model", "labels") != "labels"
    return not guided and not (classes and values["task.conditional"])


def _no_guidance(values: Values, classes: int) -> bool:
    model = values.get("task.sampling.guidance_model", "labels")
    return _no_labels(values, classes) or (
        model == "labels" and values["task.sampling.guidance"] == 1.0
    )


NO_CLASSES = "the network has no classes; give task.conditional=true and a data set with labels"
NO_EFFECT = (
    NoEffect("task.sampling.guidance", _no_labels, NO_CLASSES),
    NoEffect(
        "task.sampling.guidance_interval",
        _no_guidance,
        "guidance is disabled; give task.sampling.guidance=2",
    ),
    NoEffect(
        "task.sampling.guidance_rescale",
        _no_guidance,
        "guidance is disabled; give task.sampling.guidance=2",
    ),
    NoEffect("task.label_dropout", lambda v, c: not (c and v["task.conditional"]), NO_CLASSES),
    NoEffect(
        "task.network.text_refiner_blocks",
        lambda v, c: True,
        "the network reads no captions; leave the field out",
    ),
    NoEffect(
        "task.generator.sampling.guidance_model",
        lambda v, c: True,
        "text-to-image models use classifier-free guidance; leave the field out",
    ),
    NoEffect(
        "task.vlb_weight",
        lambda v, c: v["task.variance"] != "learned",
        "the variance is not learned; give task.variance=learned",
    ),
    NoEffect(
        "task.kl_weight",
        lambda v, c: v["task.codes"] > 0,
        "a codebook has no KL term; give task.codes=0",
    ),
    NoEffect(
        "task.commitment_weight",
        lambda v, c: v["task.codes"] == 0,
        "Gaussian latents have no commitment loss; give task.codes=256",
    ),
)


def check_effects(config: Config, overrides: Collection[str]) -> None:
    """Check that every field that the user set has an effect.

    Args:
      config: Config whose task is bound to its data set.
      overrides: Paths of the fields that the user set.

    Raises:
      UserError: If a field has no effect.
    """
    values = values_by_path(config)
    for idle in NO_EFFECT:
        if idle.path in overrides and idle.when(values, config.task.info.classes):
            raise UserError(
                f"--config.{idle.path}={values[idle.path]} has no effect: {idle.reason}"
            )


def check_sweep(config: AnyConfig, overrides: Mapping[str, str]) -> None:
    """Check that the command line does not set the field that a sweep varies.

    Raises:
      UserError: If the command line sets the varied field.
    """
    path = f"base.{config.field}" if isinstance(config, Sweep) else ""
    if path in overrides:
        raise UserError(
            f"--config.{path}={overrides[path]}: each run takes this field from --config.values; "
            "leave it out, or change --config.values"
        )


def start_with_user_field(error: ConfigError, overrides: dict[str, str]) -> UserError:
    """Return an error about contradicting fields whose message begins with a field of the user.

    Args:
      error: Error whose message begins with one of the fields and whose `others` are the rest.
      overrides: Values that the user set, as text, by the paths of their fields.
    """
    first = str(error).removeprefix("--config.").partition("=")[0]
    if first in overrides:
        return error
    for path in error.others:
        if path in overrides:
            return UserError(f"--config.{path}={overrides[path]}: {error}")
    return error
