"""The section `train` of a config, and the interface of the config that training reads."""

import dataclasses
from typing import Annotated, Literal, Protocol, runtime_checkable

from ddpm_jax.fields import MAY_CHANGE, AtLeast, Count, Interval, Length
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam, Muon


@dataclasses.dataclass(frozen=True)
class Train:
    """Settings of the training loop.

    Attributes:
      steps: Number of training steps, at the end of which a cosine learning rate reaches 0.
      batch_size: Number of images per training step, on all devices together.
      log_every: Number of training steps between two logged lines of metrics.
      eval_every: Number of training steps between two evaluations on the validation split; with 0,
        only the final evaluation on the test split runs.
      checkpoint_every: Number of training steps between two checkpoints; with 0, a checkpoint is
        written only when training ends or is stopped.
      steps_per_call: Number of training steps that one dispatch to the devices runs.
      grad_accum_steps: Number of equal parts of a batch. The gradients of the parts are computed
        one after another, which saves memory, and then averaged.
      precision: Number format in which networks compute; parameters are always float32.
      max_consecutive_nonfinite_steps: Number of consecutive training steps that are skipped if the
        loss or the gradient is not finite. One more such step stops the run, so with 0 the run
        stops at the first such step.
    """

    steps: Length = 1000
    batch_size: Count = 128
    log_every: Annotated[int, AtLeast(1), MAY_CHANGE] = 100
    eval_every: Interval = 0
    checkpoint_every: Interval = 0
    steps_per_call: Count = 1
    grad_accum_steps: Annotated[int, AtLeast(1), MAY_CHANGE] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    max_consecutive_nonfinite_steps: Annotated[int, AtLeast(0), MAY_CHANGE] = 0


@runtime_checkable
class Settings(Protocol):
    """The interface of a config for training: the sections that training reads."""

    @property
    def optimizer(self) -> Adam | Muon:
        """The section `optimizer`: the optimizer and its learning rate."""

    @property
    def ema(self) -> EMA:
        """The section `ema`: the moving averages of the parameters."""

    @property
    def train(self) -> Train:
        """The section `train`: the settings of the training loop."""
