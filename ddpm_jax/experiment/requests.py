"""What the command line asks of samples, checked against what a task can do.

This is the only code that knows the flags of sampling: a task is given a `SampleRequest` and a
guidance.
"""

from typing import NamedTuple, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from ddpm_jax.errors import UserError
from ddpm_jax.fields import FieldError
from ddpm_jax.task import GuidanceModel, SampleRequest, SamplingTask, Task, sample_classes
from ddpm_jax.tasks.image_sampler import random_classes

# What to do with a run that samples nothing.
ADVICE = {"autoencoder": "train a generation model on it, or evaluate it by --mode=eval"}


class Request(NamedTuple):
    """What `--mode=sample` asks for, besides how many; None: the run's own setting.

    Attributes:
      label: Class of all samples; None: a random one of each.
      sampler: Name of the sampler, with its argument.
      steps: Steps of the sampler.
      guidance: Scale of guidance.
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
    """A request that a task can serve.

    Attributes:
      task: The task.
      request: Without labels, which every batch has its own of.
      guidance: The guidance.
      classes: Number of classes that can be asked for; 0: none.
      label: Class of all samples; None: a random one of each.
    """

    task: SamplingTask
    request: SampleRequest
    guidance: PyTree
    classes: int
    label: int | None

    def labels(self, keys: Key[Array, "batch"]) -> Int[Array, "batch"] | None:
        """Return the class of every sample of a batch; None: they have no classes."""
        if not self.classes:
            return None
        if self.label is not None:
            return jnp.full(len(keys), self.label)
        return random_classes(keys, self.classes)


def resolve(task: Task, request: Request, model: GuidanceModel | None = None) -> Resolved:
    """Return a request as a task takes it.

    Args:
      task: bound.
      request: what is asked for.
      model: the guidance model of the run, if it has one.

    Raises:
      UserError: the task has no use for something that is asked for, or cannot do it.
    """
    if not isinstance(task, SamplingTask):
        raise UserError(
            f"--mode=sample: this run is a trained {task.provides}, which samples no images; "
            f"{ADVICE.get(task.provides, 'evaluate it by --mode=eval')}"
        )
    for name in Request._fields:
        if getattr(request, name) is not None and name not in task.request_fields:
            raise UserError(f"--{name} means nothing to this run; leave it out")
    if "prompt" in task.request_fields and request.prompt is None:
        raise UserError('this run samples what a text describes: give --prompt="..."')
    asked = SampleRequest(
        sampler=request.sampler,
        steps=request.steps,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
    )
    try:
        task.check_request(asked)
    except FieldError as error:
        raise UserError(f"--{error}") from None
    classes = sample_classes(task, model)
    _check_classes(task, request, classes, model is not None)
    try:
        guidance = task.guidance(request.guidance, model)
    except FieldError as error:
        scale = "" if request.guidance is None else f"--guidance={request.guidance:g}: "
        raise UserError(f"{scale}{error}") from None
    return Resolved(task, asked, guidance, classes, request.label)


def _check_classes(task: SamplingTask, request: Request, classes: int, guided: bool) -> None:
    """Raise UserError if a label or guidance is asked for that there is not."""
    has_guidance = classes > 0 or guided or "prompt" in task.request_fields
    for flag, possible in (("guidance", has_guidance), ("label", classes > 0)):
        if getattr(request, flag) is not None and not possible:
            raise UserError(
                f"--{flag} needs a class-conditional run, or a classifier as "
                "--config.task.sampling.guidance_model=DIR; this one has no classes"
            )
    if request.label is not None and request.label >= classes:
        raise UserError(f"--label={request.label}: there are {classes} classes, from 0 on")
