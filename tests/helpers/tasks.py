"""Bound tasks for tests: on images of a size, and with an exact denoiser for a network."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import numpy as np

from ddpm_jax.data.types import UNBOUND, DataInfo
from ddpm_jax.diffusion import schedules
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Evaluation, Task, Variables
from ddpm_jax.tasks.image_denoiser import ImageDenoiser, SampleEvaluation
from ddpm_jax.tasks.image_sampler import Sampling


def bound(task, shape, levels, classes=0, batch_size=8, caption_length=0):
    """A task bound to images of a size, in float32, and checked."""
    info = DataInfo("x", shape, levels, classes, caption_length)
    task = task.bind(info, "float32", batch_size)
    task.check()
    return task


def first_variables(task, batch):
    """The first variables of a task, by a compiled `init`."""
    return Variables(*jax.jit(task.init)(jax.random.key(0), batch))


def loss_of(task, variables, batch, keys, train=True):
    """The loss of every example of a whole batch."""
    return task.loss(variables, batch, keys, train=train, all_gather=lambda tree: tree)


def not_evaluated(task, context):
    """An evaluation that costs nothing, where only the steps matter."""
    return Evaluation({"loss": 0.0})


@dataclasses.dataclass(frozen=True)
class SmallTask(Task):
    """A task that is trained alone: a test's subclass has `init` and `loss`."""

    info: DataInfo = UNBOUND

    provides: ClassVar[str] = "nothing"

    def evaluations(self):
        """One that costs nothing."""
        return (not_evaluated,)


@dataclasses.dataclass(frozen=True)
class CutCosine(schedules.Cosine):
    """The cosine schedule between two values of logsnr."""

    lowest: float = -15.0
    highest: float = 15.0

    def make(self):
        """The schedule."""
        return schedules.cosine(self.lowest, self.highest)


@dataclasses.dataclass(frozen=True)
class EvenBetas(schedules.LinearBetas):
    """A table of so few evenly spaced betas that `linear_betas` refuses it."""

    def make(self):
        """The schedule."""
        return schedules.from_betas(np.linspace(self.first, self.last, self.steps))


@dataclasses.dataclass(frozen=True)
class ExactDenoiser(ImageDenoiser):
    """A denoiser that is given as a function: (params, x_t, logsnr, labels) -> Prediction.

    The network stands for none, and is not called.
    """

    function: Callable = None
    schedule: schedules.Schedule = schedules.Schedule(None, None)
    sampling: Sampling = Sampling()
    evaluation: SampleEvaluation = SampleEvaluation()
    classes: int = 0
    learned_variance: bool = False
    only_conditional: str = ""
    table_steps: int | None = None
    info: DataInfo = UNBOUND
    network: UNet = UNet()

    def check(self):
        """Raises FieldError if it cannot be sampled from so."""
        self.check_denoiser()

    def noise_schedule(self, params):
        """The schedule, of which the parameters hold nothing."""
        return self.schedule

    def predict(self, params, xt, logsnr, conditioning):
        """What the function returns."""
        return self.function(params, xt, logsnr, conditioning)
