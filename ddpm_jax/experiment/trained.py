"""Trained runs: their samples and denoisers, for the command line and for notebooks."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Unpack

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.prediction import Denoiser, Prediction
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.requests import Request, RequestFields, Resolved, resolve
from ddpm_jax.experiment.types import Config
from ddpm_jax.parallel import sharding
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import GuidanceModel, Resources, Task, Variables
from ddpm_jax.tasks.image_denoiser import ImageDenoiser

SAMPLE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained run, loaded from its newest checkpoint.

    Attributes:
      config: Config of the run, whose task is bound to its data set.
      variables: Averaged parameters (EMA), and extra variables, which gradients do not train.
      step: Training step of the checkpoint.
      title: EXPERIMENT, or EXPERIMENT/PART for one of several runs.
      resources: Functions that load the networks of other runs that sampling uses.
    """

    config: Config
    variables: Variables
    step: int
    title: str
    resources: Resources = Resources()

    @property
    def task(self) -> Task:
        """The task of the run, with its network."""
        return self.config.task

    @functools.cached_property
    def guidance_model(self) -> GuidanceModel | None:
        """The guidance model, loaded once; None if no other network guides the sampling."""
        return self.resources.guidance()

    def resolve(self, request: Request) -> Resolved:
        """Check a request against the task, and return it in the form that the task takes.

        Raises:
          UserError: If the run does not support a field of the request.
        """
        return resolve(self.task, request, self.guidance_model)

    def batches(
        self,
        count: int,
        request: Request,
        seed: int = 0,
        partitioner: sharding.Partitioner | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield batches of samples.

        Sample i depends on the seed and on i, but not on `count`.

        Args:
          count: Total number of samples.
          request: Options of sampling.
          seed: Seed of the samples.
          partitioner: Partitions a batch across devices; if None, the variables' devices are used.

        Yields:
          A pair (images [B, H, W, C] in [-1, 1], classes [B]). The classes are None if the model
          has no classes.

        Raises:
          UserError: If the run does not support a field of the request.
        """
        resolved = self.resolve(request)
        partitioner = partitioner or sharding.partitioner_of(self.variables.params)
        size, key = partitioner.round_up(SAMPLE_BATCH), purpose_key(seed, SAMPLE)
        for start in range(0, count, size):  # all batches have one shape, to compile once
            keys = example_keys(key, 0, partitioner.indices(start, size))
            labels = resolved.labels(keys)
            images = resolved.task.sample(
                self.variables,
                keys,
                resolved.request._replace(labels=labels),
                resolved.guidance,
                partitioner.compile,
            )
            rows = slice(count - start)
            classes = None if labels is None else sharding.fetch(labels)[rows]
            yield sharding.fetch(images)[rows], classes

    def sample(
        self, count: int, *, seed: int = 0, **request: Unpack[RequestFields]
    ) -> Float[np.ndarray, "count h w c"]:
        """Return sampled images [count, H, W, C] in [-1, 1].

        Args:
          count: Number of samples.
          seed: Seed of the samples.
          **request: Fields of `requests.Request`: label, sampler, steps, guidance, prompt,
            negative_prompt.

        Raises:
          UserError: If the run does not support a field of the request.
        """
        batches = self.batches(count, Request(**request), seed)
        return np.concatenate([images for images, _ in batches])

    def denoiser(
        self,
        labels: Sequence[int] | Int[np.ndarray, "batch"] | Int[Array, "batch"] | None = None,
        **request: Unpack[RequestFields],
    ) -> Denoiser:
        """Return the denoiser that sampling uses, with guidance.

        Args:
          labels: Classes [B] of the images; None for an unconditional network.
          **request: Fields of `requests.Request`, such as guidance.

        Returns:
          A function (x_t, logsnr) -> Prediction(x0, eps). The images x_t, x0 and eps have the shape
          [B, H, W, C], and logsnr is the log signal-to-noise ratio of x_t.

        Raises:
          UserError: If the task has no denoiser, or does not support a field of the request.
        """
        task = self.task
        if not isinstance(task, ImageDenoiser):
            raise UserError(f"a run of {self.title} has no denoiser; load a diffusion run instead")
        resolved = self.resolve(Request(**request))
        classes = None if labels is None else jnp.asarray(labels)
        denoise = task.denoiser(
            self.variables, resolved.request._replace(labels=classes), resolved.guidance
        )

        def denoise_arrays(xt: ArrayLike, logsnr: ArrayLike) -> Prediction:
            return denoise(jnp.asarray(xt), jnp.asarray(logsnr, jnp.float32))

        return denoise_arrays
