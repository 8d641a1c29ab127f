"""Requests for samples: the sampling flags of the command line, checked against a task.

Only this module refers to these flags. A task receives a `SampleRequest` and a guidance.
"""

from typing import NamedTuple, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from ddpm_jax.errors import UserError
from ddpm_jax.fields import FieldError
from ddpm_jax.task import GuidanceModel, SampleRequest, SamplingTask, Task, sample_classes
from ddpm_jax.tasks.image_sampler import random_classes

# Advice in the error for tasks that sample no images, by what the task provides.
ADVICE = {"autoencoder": "train a generation model on it, or use --mode=eval"}


class Request(NamedTuple):
    """Settings of `--mode=sample`; a field that is None takes the setting of the run.

    Attributes:
      label: Class of all samples; if None, every sample gets a random class.
      sampler: Name of the sampler, with its argument, such as "ddim:0.5".
      steps: Number of sampling steps.
      guidance: Guidance scale.
      prompt: Text that the samples show.
      negative_prompt: Text that guidance leads away from.
    """

    label: int | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


class RequestFields(TypedDict, total=False):
    """The fields of a `Request` as keyword arguments."""

    label: int | None
    sampler: str | None
    steps: int | None
    guidance: float | None
    prompt: str | None
    negative_prompt: str | None


class Resolved(NamedTuple):
    """A request that was checked against a task.

    Attributes:
      task: The task.
      request: The request without labels, which differ between batches.
      guidance: The guidance that the task samples with.
      classes: Number of classes that can be requested; 0 if samples have no classes.
      label: Class of all samples; if None, every sample gets a random class.
    """

    task: SamplingTask
    request: SampleRequest
    guidance: PyTree
    classes: int
    label: int | None

    def labels(self, keys: Key[Array, "batch"]) -> Int[Array, "batch"] | None:
        """Return the class of every sample of a batch, or None if samples have no classes."""
        if not self.classes:
            return None
        if self.label is not None:
            return jnp.full(len(keys), self.label)
        return random_classes(keys, self.classes)


def resolve(task: Task, request: Request, model: GuidanceModel | None = None) -> Resolved:
    """Return a request after checking it against a task.

    Args:
      task: Task, bound to its data set.
      request: The request.
      model: Guidance model of the run, or None.

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
    """Raise UserError if the request has a label or guidance that the run does not support."""
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
