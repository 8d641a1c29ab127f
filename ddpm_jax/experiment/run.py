"""Train an experiment: one run, or several in directories of their own."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ddpm_jax import plots
from ddpm_jax.config import hints_of, marked
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.experiment import resources
from ddpm_jax.experiment.effects import check_effects
from ddpm_jax.experiment.guidance_models import check_guides_another
from ddpm_jax.experiment.inputs import load_data, record_of
from ddpm_jax.experiment.preflight import check_parts
from ddpm_jax.experiment.train import check, fit_run, open_directory, opened, train_alone
from ddpm_jax.experiment.types import Config, Context, Experiment, Options, Recipe, Run, parts_of
from ddpm_jax.fields import MAY_CHANGE
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.progress import print_result
from ddpm_jax.training.records import can_write, write_json


def train(
    experiment: Experiment, config: Any, workdir: pathlib.Path, options: Options
) -> dict[str, Any] | None:
    """Train an experiment to its end; return its summary, or None if it was stopped.

    Args:
      experiment: the experiment.
      config: its config, with what the command line changes.
      workdir: its directory.
      options: what the command line says besides.
    """
    with full_paths(config):
        loaded = load_data(experiment, config.data, workdir, options)
    if experiment.several:
        return train_several(experiment, config, workdir, options, loaded)
    return train_run(Run(experiment.name, config, workdir, loaded, options))


def train_run(run: Run) -> dict[str, Any] | None:
    """Train one run to its end; return its summary, or None if it was stopped."""
    run = run.bound()
    check_effects(run.config, run.options.overrides)
    run = run._replace(config=resources.prepare(run.config, run.loaded))
    check_guides_another(run.config, run.workdir)
    check(run)
    directory = open_directory(run)
    with contextlib.ExitStack() as stack:
        stack.callback(directory.close)
        needed = resources.load(run.config, run.loaded, run.options, train_alone)
        if needed is None:
            return None
        data = run.config.task.adapt(run.loaded.data)
        stack.pop_all()  # `fit_run` closes it
    return fit_run(run, data, needed, directory)


def train_several(
    experiment: Experiment, config: Any, workdir: pathlib.Path, options: Options, loaded: Loaded
) -> dict[str, Any] | None:
    """Train the runs of an experiment one after another, and report what they show.

    What is finished is logged and left alone.

    Returns:
      The record of the report; None if it was asked to stop.
    """
    workdir = workdir.absolute()
    parts = parts_of(config, workdir)
    runs = {
        part: Run(experiment.name, own, workdir / part, loaded, options, part)
        for part, own in parts.items()
    }
    check_several(config, runs)
    check_parts(workdir, experiment.name, parts)
    record = record_of(experiment.name, config, config.data, loaded, options)
    with opened(workdir, record, marked(config, MAY_CHANGE)):
        summaries = {}
        for part, run in runs.items():
            summary = train_run(run)
            if summary is None:  # asked to stop
                return None
            summaries[part] = summary
        return report(experiment, config, summaries, Context(workdir, options, loaded))


def check_several(config: Any, runs: dict[str, Run]) -> None:
    """Check every run, and what it names of others, before the first is trained.

    Args:
      config: that of all runs, a `SeveralRuns`.
      runs: by their directories.

    Raises:
      UserError: fields contradict each other, a run cannot fit into memory, or another run that it
        names is not there.
    """
    pending = {str(run.workdir) for run in runs.values()}
    bound = {part: run.bound() for part, run in runs.items()}
    configs = {part: run.config for part, run in bound.items()}
    for part, run in bound.items():
        with full_paths(config, run.config):
            complete = config.complete(part, configs)
            check(run._replace(config=resources.prepare(complete, run.loaded, pending)))


@contextlib.contextmanager
def full_paths(config: Any, part: Config | None = None) -> Iterator[None]:
    """Name fields in errors about one of several runs as the command line does.

    Args:
      config: of all runs.
      part: of the run; None: what is done holds for all of them.
    """
    try:
        yield
    except UserError as error:
        message, others = str(error), error.others if isinstance(error, ConfigError) else ()
        for name in hints_of(type(config)):
            section = getattr(config, name)
            if isinstance(section, Config) or (
                isinstance(section, Recipe) and part and type(section.task) is type(part.task)
            ):
                fields = "|".join(hints_of(type(section)))
                message = re.sub(rf"--config\.({fields})\b", rf"--config.{name}.\1", message)
                others = tuple(f"{name}.{other}" for other in others)
        raise ConfigError(message, *others) from None


def report(
    experiment: Experiment, config: Any, summaries: dict[str, dict[str, Any]], context: Context
) -> dict[str, Any]:
    """Print and write what the runs of an experiment show."""
    assert experiment.report is not None
    found = experiment.report(config, summaries, context)
    written = {"experiment": experiment.name, "data": context.loaded.data.title, **found.record}
    if not is_main():
        return written
    print_result(plots.table(found.rows, found.title))
    images = context.workdir / "images"
    for name, figure in found.figures.items():
        with can_write(context.workdir):
            plots.save_png(images / f"{name}.png", figure)
    path = context.workdir / "summary.json"
    write_json(path, written)
    print_result(f"  pictures in {images}, figures in {path}")
    return written
