"""The evaluation of a task on the validation or test split."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.errors import NonFinite, RunError
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.parallel.partitioner import Partitioner, fetch
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.system.record import Record
from ddpm_jax.task import (
    Compile,
    Context,
    Evaluation,
    GuidanceModel,
    Resources,
    Samples,
    SamplingTask,
    Task,
    Variables,
    sample_classes,
)
from ddpm_jax.training.ema import parameters_used
from ddpm_jax.training.settings import Settings

SAMPLES_AT_ONCE = 100  # number of images in a batch of samples

R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class EvaluationContext(Context):
    """The arguments and cached results that the functions of one evaluation share.

    `task.Context` describes the other arguments, which are attributes of the same names.

    Args:
      partitioner: The partitioner, which partitions batches across the devices.
      check_preemption: A function that is called between batches and may raise an exception to end
        the evaluation early.
    """

    def __init__(
        self,
        task: Task,
        variables: Variables,
        data: Data,
        *,
        split: str,
        seed: int,
        full: bool,
        partitioner: Partitioner,
        resources: Resources = Resources(),
        check_preemption: Callable[[], None] = lambda: None,
    ) -> None:
        self.task, self.variables, self.data = task, variables, data
        self.split, self.seed, self.full = split, seed, full
        self.partitioner, self.resources = partitioner, resources
        self._check = check_preemption
        self._results: dict[Callable[[Context], PyTree], PyTree] = {}
        self._batches: list[np.ndarray] = []
        self._trace: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def held_out(self) -> Split:
        """The examples of the evaluated split."""
        return self.data.split(self.split)

    @property
    def compile(self) -> Compile:
        """A function like `jax.jit`, which compiles functions for the devices of the evaluation."""
        return self.partitioner.compile

    @functools.cached_property
    def guidance_model(self) -> GuidanceModel | None:
        """The guidance model, loaded from another run; None if the config names no such run."""
        return self.resources.guidance()

    @functools.cached_property
    def guidance(self) -> PyTree:
        """The `diffusion.guidance.Guidance` of sampling, from the task's config, or None."""
        return self._sampling_task.guidance(None, self.guidance_model)

    @property
    def classes(self) -> int:
        """Number of classes on which samples are conditioned; 0 if samples have no classes."""
        return sample_classes(self._sampling_task, self.guidance_model)

    @property
    def _sampling_task(self) -> SamplingTask:
        assert isinstance(self.task, SamplingTask)
        return self.task

    def cached(self, compute: Callable[[Context], R]) -> R:
        """Return `compute(self)`, which is computed at the first call and then cached."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        result: R = self._results[compute]
        return result

    def per_example(
        self,
        compute: Callable[[T, *Ts, Batch, Key[Array, "batch"]], dict[str, Array]],
        split: Split,
        batch_size: int,
        *arguments: *Ts,
    ) -> dict[str, np.ndarray]:
        """Return the results of a function for every example of a split, [N, ...] by name.

        `task.Context.per_example` describes the arguments.
        """
        return per_example(
            compute,
            split,
            batch_size,
            self.seed,
            self.partitioner,
            cast(T, self.task),  # evaluation functions take the type of their task
            *arguments,
            check=self._check,
            static_argnums=0,
        )

    def samples(self, count: int) -> Samples:
        """Return the first `count` samples; sample i has class i modulo the number of classes.

        Samples are cached, so a second call returns the same images without sampling them again.
        """
        size = self.round_up(SAMPLES_AT_ONCE)
        while sum(map(len, self._batches)) < count:  # equal shapes, one compilation
            self.check_preemption()
            index = self.partitioner.indices(sum(map(len, self._batches)), size)
            keys = example_keys(purpose_key(self.seed, SAMPLE), 0, index)
            task = self._sampling_task
            images, trace = task.sample_for_evaluation(keys, index, self)
            self._batches.append(fetch(images))
            self._trace = self._trace or fetch(trace)
        if len(self._batches) > 1:
            self._batches = [np.concatenate(self._batches)]  # free the separate batches
        labels = np.arange(count) % self.classes if self.classes else None
        return Samples(self._batches[0][:count], labels, self._trace)

    def round_up(self, batch_size: int) -> int:
        """Return the smallest multiple of the number of devices that is at least `batch_size`."""
        return self.partitioner.round_up(batch_size)

    def place(self, tree: PyTree) -> PyTree:
        """Partition arrays [B, ...] across the devices; each process passes the full batch."""
        size = len(jax.tree.leaves(tree)[0])
        rows = self.partitioner.rows(size)
        return self.partitioner.shard(jax.tree.map(lambda array: array[rows], tree))

    def check_preemption(self) -> None:
        """End the evaluation in all processes if one of them received a stop signal."""
        self._check()


def evaluate(context: EvaluationContext) -> Evaluation:
    """Call all evaluation functions of a task and return their results together.

    The name of every metric begins with the name of the split, as in "test/loss".

    Raises:
      RunError: If a metric is not finite.
    """
    metrics: dict[str, float] = {}
    images: dict[str, np.ndarray | NonFinite] = {}
    about: Record = {}
    for function in context.task.evaluations():
        part = function(context.task, context)
        metrics |= part.metrics
        images |= part.images
        about |= part.about
    check_finite_metrics(metrics)
    metrics = {f"{context.split}/{name}": value for name, value in metrics.items()}
    return Evaluation(metrics, images, about)


def check_finite_metrics(metrics: dict[str, float]) -> None:
    """Check that all metrics are finite.

    Raises:
      RunError: If a metric is not finite.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(
                f"the metric {name} is {value}, so training has diverged; train again in another "
                "--workdir with a smaller --config.optimizer.learning_rate or with "
                "--config.optimizer.grad_clip_norm=1"
            )


def describe_evaluation(evaluation: Evaluation, config: Settings) -> Record:
    """Return `evaluation.about` with the name and a description of the evaluated average."""
    return {
        **evaluation.about,
        "ema": config.ema.names[config.ema.index],
        "parameters": parameters_used(config.ema),
    }
