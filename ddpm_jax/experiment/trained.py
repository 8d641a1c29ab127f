"""A trained run: its samples and its denoiser, for the command line and for notebooks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.types import Config
from ddpm_jax.parallel import sharding
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Request, Task, Variables

SAMPLE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained run: what `--mode=sample` samples with.

    Attributes:
      config: The config of the run, bound to its data set.
      variables: The averaged parameters that are evaluated, and what is not differentiated.
      step: The step of the checkpoint.
      title: The experiment's name, and the part's.
      functions: The functions of the task.
    """

    config: Config
    variables: Variables
    step: int
    title: str
    functions: Task

    @property
    def task(self) -> Any:
        """The section `task` of the config, with its network."""
        return self.config.task

    def batches(
        self, count: int, request: Request, seed: int = 0, spread: sharding.Parallel | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield batches of samples, `count` in all.

        Sample i is the same whatever `count` is, and another with every seed.

        Args:
          count: number of samples.
          request: how to sample.
          seed: of the samples.
          spread: the devices; None: those of the variables.

        Yields:
          Images [B, H, W, C] in [-1, 1], and their classes [B]; None: they have none.

        Raises:
          UserError: the run has no use for something that the request asks for.
        """
        spread = spread or sharding.placed(self.variables.params)
        size, key = spread.round_up(SAMPLE_BATCH), purpose_key(seed, SAMPLE)
        for start in range(0, count, size):  # one shape, compiled once
            keys = example_keys(key, 0, spread.indices(start, size))
            images = sharding.fetch(self.functions.sample(*self.variables, keys, request, spread))
            labels = self.functions.labels and sharding.fetch(self.functions.labels(keys, request))
            own = slice(count - start)
            yield images[own], None if labels is None else labels[own]

    def sample(self, count: int, *, seed: int = 0, **request: Any) -> np.ndarray:
        """Return samples [count, H, W, C] in [-1, 1].

        Args:
          count: number of samples.
          seed: of the samples.
          **request: fields of a `task.Request`: label, sampler, steps, guidance, prompt,
            negative_prompt.

        Raises:
          UserError: the run has no use for something that the request asks for.
        """
        batches = self.batches(count, Request(**request), seed)
        return np.concatenate([images for images, _ in batches])

    def denoiser(self, labels: Any = None, **request: Any) -> Denoiser:
        """Return the denoiser that sampling walks with.

        Args:
          labels: classes [B]; None: the network has none.
          **request: fields of a `task.Request`, such as guidance.

        Returns:
          (x_t [B, H, W, C], logsnr) -> Prediction(x0, eps).

        Raises:
          UserError: the task has no denoiser.
        """
        if self.functions.denoiser is None:
            raise UserError(f"a run of {self.title} has no denoiser; give that of a diffusion run")
        labels = None if labels is None else jnp.asarray(labels)
        denoise = self.functions.denoiser(self.variables.params, labels, Request(**request))
        return lambda xt, logsnr: denoise(jnp.asarray(xt), jnp.asarray(logsnr, jnp.float32))
