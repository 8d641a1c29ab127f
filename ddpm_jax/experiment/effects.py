"""Refuse fields that the user set and that have no effect, or that contradict each other."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeAlias

from ddpm_jax.config import Setting, flat
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.experiment.types import AnyConfig, Config, Sweep

Values: TypeAlias = dict[str, Setting]  # of the fields of a config, by their paths


class Idle(NamedTuple):
    """When a field has no effect.

    Attributes:
      path: The field.
      when: Whether it has none, of all values by their paths.
      reason: Why, and what to do.
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
IDLE = (
    Idle("task.sampling.guidance", _no_labels, NO_CLASSES),
    Idle("task.sampling.guidance_interval", _no_guidance, "there is no guidance to limit"),
    Idle("task.sampling.guidance_rescale", _no_guidance, "there is no guidance to rescale"),
    Idle("task.label_dropout", lambda v, c: not (c and v["task.conditional"]), NO_CLASSES),
    Idle(
        "task.network.text_refiner_blocks",
        lambda v, c: True,
        "the network reads no captions; leave it out",
    ),
    Idle(
        "task.generator.sampling.guidance_model",
        lambda v, c: True,
        "the captions guide the network; leave it out",
    ),
    Idle(
        "task.vlb_weight",
        lambda v, c: v["task.variance"] != "learned",
        "the variance is not learned; give task.variance=learned",
    ),
    Idle("task.kl_weight", lambda v, c: v["task.codes"] > 0, "codes have no KL; give codes=0"),
    Idle(
        "task.commitment_weight",
        lambda v, c: v["task.codes"] == 0,
        "Gaussian latents have no commitment loss; give codes=256",
    ),
)


def check_effects(config: Config, overrides: Collection[str]) -> None:
    """Check that every field that the user set has an effect.

    Args:
      config: bound to its data.
      overrides: paths of the fields that the user set.

    Raises:
      UserError: a field has none.
    """
    values = flat(config)
    for idle in IDLE:
        if idle.path in overrides and idle.when(values, config.task.info.classes):
            raise UserError(
                f"--config.{idle.path}={values[idle.path]}: has no effect: {idle.reason}"
            )


def check_sweep(config: AnyConfig, overrides: Mapping[str, str]) -> None:
    """Check that the user leaves the field of a sweep to the sweep.

    Raises:
      UserError: the command line sets it.
    """
    path = f"base.{config.field}" if isinstance(config, Sweep) else ""
    if path in overrides:
        raise UserError(
            f"--config.{path}={overrides[path]}: each run takes it from --config.values; leave "
            "it out"
        )


def named_by_user(error: ConfigError, overrides: dict[str, str]) -> UserError:
    """Return a contradiction's error, which begins with a field that the user set.

    Args:
      error: which begins with one of the fields.
      overrides: what the user set, by path.
    """
    first = str(error).removeprefix("--config.").partition("=")[0]
    if first in overrides:
        return error
    for path in error.others:
        if path in overrides:
            return UserError(f"--config.{path}={overrides[path]}: {error}")
    return error
