"""Tasks for tests: bound to images of a given size, or with an exact denoiser as the network."""

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
    """Return a task in float32, bound to images of a shape and number of grey levels."""
    info = DataInfo("x", shape, levels, classes, caption_length)
    task = task.bind(info, "float32", batch_size)
    task.check()
    return task


def first_variables(task, batch):
    """Return the initial variables of a task, by a compiled `init`."""
    return Variables(*jax.jit(task.init)(jax.random.key(0), batch))


def loss_of(task, variables, batch, keys, train=True):
    """Return the loss of every example of a batch on one device."""
    return task.loss(variables, batch, keys, train=train, all_gather=lambda tree: tree)


def not_evaluated(task, context):
    """Return a constant loss, for tests of training steps alone."""
    return Evaluation({"loss": 0.0})


@dataclasses.dataclass(frozen=True)
class SmallTask(Task):
    """A task without a real evaluation; a test's subclass implements `init` and `loss`."""

    info: DataInfo = UNBOUND

    run_type: ClassVar[str] = "nothing"

    def evaluations(self):
        """Return the evaluation of constant loss."""
        return (not_evaluated,)


@dataclasses.dataclass(frozen=True)
class CutCosine(schedules.Cosine):
    """The cosine schedule, truncated to a range of logsnr."""

    lowest: float = -15.0
    highest: float = 15.0

    def make(self):
        """Return the schedule."""
        return schedules.cosine(self.lowest, self.highest)


@dataclasses.dataclass(frozen=True)
class EvenBetas(schedules.LinearBetas):
    """A table of evenly spaced betas, with fewer steps than `linear_betas` allows."""

    def make(self):
        """Return the schedule."""
        return schedules.from_betas(np.linspace(self.first, self.last, self.steps))


@dataclasses.dataclass(frozen=True)
class ExactDenoiser(ImageDenoiser):
    """A denoising task whose prediction is `function(params, x_t, logsnr, labels)`.

    The field `network` is not called.
    """

    function: Callable = None
    schedule: schedules.Schedule = schedules.Schedule(None, None)
    sampling: Sampling = Sampling()
    evaluation: SampleEvaluation = SampleEvaluation()
    classes: int = 0
    learned_variance: bool = False
    no_label_dropout: str = ""
    table_steps: int | None = None
    info: DataInfo = UNBOUND
    network: UNet = UNet()

    def check(self):
        """Raise FieldError if the settings of sampling do not fit the schedule."""
        self.check_denoiser()

    def noise_schedule(self, params):
        """Return the schedule, which does not depend on the parameters."""
        return self.schedule

    def predict(self, params, xt, logsnr, conditioning):
        """Return the prediction of the function."""
        return self.function(params, xt, logsnr, conditioning)
