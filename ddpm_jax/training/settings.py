"""How a run trains: the section `train` of a config, and what training reads of a config."""

import dataclasses
from typing import Annotated, Literal, Protocol, runtime_checkable

from ddpm_jax.fields import MAY_CHANGE, AtLeast, Count, Interval, Length
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam, Muon


@dataclasses.dataclass(frozen=True)
class Train:
    """How long a run trains, and how often it reports.

    Attributes:
      steps: Steps of training. Changing it changes a learning rate that decays, too.
      batch_size: Training images of one step, on all devices together.
      log_every: Steps between two lines of the log.
      eval_every: Steps between two evaluations on the validation split; 0: only at the end.
      checkpoint_every: Steps between two checkpoints; 0: only at the end.
      steps_per_call: Steps that one dispatch runs on the device.
      grad_accum_steps: Parts that a batch is taken in, one after another.
      precision: Type that networks compute in; parameters are float32.
      max_consecutive_nonfinite_steps: Steps in a row whose update is skipped because it is not
        finite, before the run stops; 0: stop at the first.
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
    """What training reads of a run's config."""

    @property
    def optimizer(self) -> Adam | Muon:
        """The optimizer."""

    @property
    def ema(self) -> EMA:
        """The averages of the parameters."""

    @property
    def train(self) -> Train:
        """How long the run trains, and how often it reports."""
