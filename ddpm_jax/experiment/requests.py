"""Requests for samples: the values of the sampling flags, checked against a task.

Only this module names these flags. A task receives a `SampleRequest` and a guidance method.
"""

from typing import NamedTuple, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from ddpm_jax.errors import UserError
from ddpm_jax.fields import FieldError
from ddpm_jax.task import GuidanceModel, SampleRequest, SamplingTask, Task, sample_classes
from ddpm_jax.tasks.image_sampler import random_classes

# Advice in the error message for a run that samples no images, by `Task.run_type`.
ADVICE = {"autoencoder": "train a generation model on it, or use --mode=eval"}


class Request(NamedTuple):
    """Options of sampling. If a field is None, the value in the config of the run is used.

    Attributes:
      label: Class of all samples; if None, every sample gets a random class.
      sampler: Name of the sampler, with its argument if it has one, such as "ddim:0.5".
      steps: Number of sampling steps.
      guidance: Guidance scale.
      prompt: Text that the samples show.
      negative_prompt: Text that replaces the null conditioning of classifier-free guidance.
    """

    label: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


class RequestFields(TypedDict, total=False):
    """The fields of a `Request` as keyword arguments, for type checkers."""

    label: int | None
    sampler: str | None
    steps: int | None
    guidance: float | None
    prompt: str | None
    negative_prompt: str | None


class Resolved(NamedTuple):
    """A request that was checked against a task.

    Attributes:
      task: The task that samples.
      request: The request as the task takes it, without labels; `labels` returns those of a batch.
      guidance: The guidance method of sampling, with its scale.
      classes: Number of classes that can be requested; 0 if samples have no classes.
      label: Class of all samples; if None, every sample gets a random class.
    """

    task: SamplingTask
    request: SampleRequest
    guidance: PyTree
    classes: int
    label: int | None

    def labels(self, keys: Key[Array, "batch"]) -> Int[Array, "batch"] | None:
        """Return the classes [batch] of samples, given one key per sample; None without classes."""
        if not self.classes:
            return None
        if self.label is not None:
            return jnp.full(len(keys), self.label)
        return random_classes(keys, self.classes)


def resolve(task: Task, request: Request, model: GuidanceModel | None = None) -> Resolved:
    """Check a request against a task, and return it in the form that the task takes.

    Args:
      task: Task that is bound to its data set.
      request: Options of sampling.
      model: Guidance model of the run; None if no other network guides sampling.

    Raises:
      UserError: If a field of the request has no effect for the task, or the task does not support
        its value.
    """
    if not isinstance(task, SamplingTask):
        raise UserError(
            f"--mode=sample: this run is a trained {task.run_type}, which samples no images; "
            f"{ADVICE.get(task.run_type, 'use --mode=eval')}"
        )
    for name in Request._fields:
        if getattr(request, name) is not None and name not in task.request_fields:
            raise UserError(f"--{name} has no effect for this run; leave it out")
    if "prompt" in task.request_fields and request.prompt is None:
        raise UserError('this run samples images from a text: give --prompt="..."')
    sample_request = SampleRequest(
        sampler=request.sampler,
        steps=request.steps,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
    )
    try:
        task.check_request(sample_request)
    except FieldError as error:
        raise UserError(f"--{error}") from None
    classes = sample_classes(task, model)
    _check_classes(task, request, classes, model is not None)
    try:
        guidance = task.guidance(request.guidance, model)
    except FieldError as error:
        scale = "" if request.guidance is None else f"--guidance={request.guidance:g}: "
        raise UserError(f"{scale}{error}") from None
    return Resolved(task, sample_request, guidance, classes, request.label)


def _check_classes(task: SamplingTask, request: Request, classes: int, guided: bool) -> None:
    """Raise UserError if the run does not support the request's label or guidance scale."""
    has_guidance = classes > 0 or guided or "prompt" in task.request_fields
    for flag, possible in (("guidance", has_guidance), ("label", classes > 0)):
        if getattr(request, flag) is not None and not possible:
            raise UserError(
                f"--{flag} needs a class-conditional run, or a classifier as "
                "--config.task.sampling.guidance_model=DIR; this run has no classes"
            )
    if request.label is not None and request.label >= classes:
        raise UserError(
            f"--label={request.label}: there are {classes} classes; give a number from 0 to "
            f"{classes - 1}"
        )
