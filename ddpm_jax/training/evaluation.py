"""Evaluate a task on a split, and write its metrics and images."""

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

SAMPLES_AT_ONCE = 100  # images of one call of a sampler

R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class EvaluationContext(Context):
    """What the functions of one evaluation share; see `task.Context`."""

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
        """The examples of the split."""
        return self.data.part(self.split)

    @property
    def compile(self) -> Compile:
        """Compiles functions for the devices."""
        return self.partitioner.compile

    @functools.cached_property
    def guidance_model(self) -> GuidanceModel | None:
        """The model that guides sampling; None: there is none."""
        return self.resources.guidance()

    @functools.cached_property
    def guidance(self) -> PyTree:
        """The guidance of the task's settings."""
        return self._sampling_task.guidance(None, self.guidance_model)

    @property
    def classes(self) -> int:
        """Number of classes that samples have."""
        return sample_classes(self._sampling_task, self.guidance_model)

    @property
    def _sampling_task(self) -> SamplingTask:
        assert isinstance(self.task, SamplingTask)
        return self.task

    def shared(self, compute: Callable[[Context], R]) -> R:
        """Return `compute(context)`, which is computed once for an evaluation."""
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
        """Return `compute(task, *arguments, batch, keys)` of every example, in the split's order.

        Args:
          compute: a function of a module, which is compiled with the task as a static argument.
          split: the examples.
          batch_size: examples at a time; it changes no result.
          arguments: what the function needs besides, such as variables.
        """
        return per_example(
            compute,
            split,
            batch_size,
            self.seed,
            self.partitioner,
            cast(T, self.task),  # whose functions evaluate it
            *arguments,
            check=self._check,
            static_argnums=0,
        )

    def samples(self, count: int) -> Samples:
        """Return samples of the task's settings, the classes in turn; each is sampled once."""
        size = self.round_up(SAMPLES_AT_ONCE)
        while sum(map(len, self._batches)) < count:  # one shape, compiled once
            self.check_preemption()
            place = self.partitioner.indices(sum(map(len, self._batches)), size)
            keys = example_keys(purpose_key(self.seed, SAMPLE), 0, place)
            task = self._sampling_task
            images, trace = task.sample_in_turn(keys, place, self)
            self._batches.append(fetch(images))
            self._trace = self._trace or fetch(trace)
        if len(self._batches) > 1:
            self._batches = [np.concatenate(self._batches)]  # held once
        labels = np.arange(count) % self.classes if self.classes else None
        return Samples(self._batches[0][:count], labels, self._trace)

    def round_up(self, batch_size: int) -> int:
        """Return the next batch size that the devices divide."""
        return self.partitioner.round_up(batch_size)

    def place(self, tree: PyTree) -> PyTree:
        """Return arrays of a whole batch, which all processes have, spread over the devices."""
        size = len(jax.tree.leaves(tree)[0])
        rows = self.partitioner.rows(size)
        return self.partitioner.shard(jax.tree.map(lambda array: array[rows], tree))

    def check_preemption(self) -> None:
        """End the evaluation in all processes if it was asked for."""
        self._check()


def evaluate(context: EvaluationContext) -> Evaluation:
    """Return what all functions of a task find of a split, whose name stands before every metric's.

    Raises:
      RunError: a metric is not finite.
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
    """Check that metrics are numbers.

    Raises:
      RunError: one is not finite.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(
                f"{name} is {value}: training diverged; train again with a lower "
                "--config.optimizer.learning_rate"
            )


def describe_evaluation(evaluation: Evaluation, config: Settings) -> Record:
    """Return what the record states about an evaluation, with the parameters that it used."""
    return {
        **evaluation.about,
        "ema": config.ema.names[config.ema.index],
        "parameters": parameters_used(config.ema),
    }
