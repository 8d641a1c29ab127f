"""A trained run: its samples and its denoiser, for the command line and for notebooks."""

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
    """A trained run: what `--mode=sample` samples with.

    Attributes:
      config: The config of the run, bound to its data set.
      variables: The averaged parameters that are evaluated, and what is not differentiated.
      step: The step of the checkpoint.
      title: The experiment's name, and the part's.
      resources: What the task needs of other runs.
    """

    config: Config
    variables: Variables
    step: int
    title: str
    resources: Resources = Resources()

    @property
    def task(self) -> Task:
        """The section `task` of the config, with its network."""
        return self.config.task

    @functools.cached_property
    def guidance_model(self) -> GuidanceModel | None:
        """The model that guides sampling, loaded once for this run; None: there is none."""
        return self.resources.guidance()

    def resolve(self, request: Request) -> Resolved:
        """Return a request as the task takes it.

        Raises:
          UserError: the run has no use for something that the request asks for.
        """
        return resolve(self.task, request, self.guidance_model)

    def batches(
        self,
        count: int,
        request: Request,
        seed: int = 0,
        partitioner: sharding.Partitioner | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield batches of samples, `count` in all.

        Sample i is the same whatever `count` is, and another with every seed.

        Args:
          count: number of samples.
          request: how to sample.
          seed: of the samples.
          partitioner: the devices; None: those of the variables.

        Yields:
          Images [B, H, W, C] in [-1, 1], and their classes [B]; None: they have none.

        Raises:
          UserError: the run has no use for something that the request asks for.
        """
        resolved = self.resolve(request)
        partitioner = partitioner or sharding.placed(self.variables.params)
        size, key = partitioner.round_up(SAMPLE_BATCH), purpose_key(seed, SAMPLE)
        for start in range(0, count, size):  # one shape, compiled once
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
        """Return samples [count, H, W, C] in [-1, 1].

        Args:
          count: number of samples.
          seed: of the samples.
          **request: fields of a `requests.Request`: label, sampler, steps, guidance, prompt,
            negative_prompt.

        Raises:
          UserError: the run has no use for something that the request asks for.
        """
        batches = self.batches(count, Request(**request), seed)
        return np.concatenate([images for images, _ in batches])

    def denoiser(
        self,
        labels: Sequence[int] | Int[np.ndarray, "batch"] | Int[Array, "batch"] | None = None,
        **request: Unpack[RequestFields],
    ) -> Denoiser:
        """Return the denoiser that sampling uses.

        Args:
          labels: classes [B]; None: the network has none.
          **request: fields of a `requests.Request`, such as guidance.

        Returns:
          (x_t [B, H, W, C], logsnr) -> Prediction(x0, eps).

        Raises:
          UserError: the task has no denoiser.
        """
        task = self.task
        if not isinstance(task, ImageDenoiser):
            raise UserError(f"a run of {self.title} has no denoiser; give that of a diffusion run")
        resolved = self.resolve(Request(**request))
        classes = None if labels is None else jnp.asarray(labels)
        denoise = task.denoiser(
            self.variables, resolved.request._replace(labels=classes), resolved.guidance
        )

        def denoise_arrays(xt: ArrayLike, logsnr: ArrayLike) -> Prediction:
            return denoise(jnp.asarray(xt), jnp.asarray(logsnr, jnp.float32))

        return denoise_arrays
