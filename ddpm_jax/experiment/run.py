"""Train an experiment: a single run, or several runs in separate directories."""

import contextlib
import pathlib
import re
from collections.abc import Iterator

from ddpm_jax import plots
from ddpm_jax.config import hints_of, marked_paths
from ddpm_jax.config_records import defaults_by_path
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import ConfigError, UserError
from ddpm_jax.experiment import resources
from ddpm_jax.experiment.effects import check_effects
from ddpm_jax.experiment.guidance_models import check_not_guided_by_itself
from ddpm_jax.experiment.inputs import load_data, record_of
from ddpm_jax.experiment.preflight import check_parts
from ddpm_jax.experiment.train import check, fit_run, open_directory, opened, train_alone
from ddpm_jax.experiment.types import (
    AnyConfig,
    Config,
    Context,
    Experiment,
    Options,
    Recipe,
    Run,
    SeveralRuns,
    parts_of,
)
from ddpm_jax.fields import MAY_CHANGE
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.progress import print_result
from ddpm_jax.system.record import Record
from ddpm_jax.training.records import reporting_write_errors, write_json


def train(
    experiment: Experiment, config: AnyConfig, workdir: pathlib.Path, options: Options
) -> Record | None:
    """Train an experiment; return its summary.json, or None if the user stopped the training.

    Args:
      experiment: The experiment.
      config: Config of the experiment, with the overrides of the command line.
      workdir: Directory of the experiment.
      options: Options of the command line.
    """
    with full_paths(config):
        loaded = load_data(experiment, config.data, workdir, options)
    if isinstance(config, Config):
        return train_run(Run(experiment.name, config, workdir, loaded, options))
    return train_several(experiment, config, workdir, options, loaded)


def train_run(run: Run) -> Record | None:
    """Train one run; return its summary.json, or None if the user stopped the training."""
    run = run.bound()
    check_effects(run.config, run.options.overrides)
    run = run._replace(config=resources.prepare(run.config, run.loaded))
    check_not_guided_by_itself(run.config, run.workdir)
    check(run)
    directory = open_directory(run)
    with contextlib.ExitStack() as stack:
        stack.callback(directory.close)
        run_resources = resources.load(run.config, run.loaded, run.options, train_alone)
        if run_resources is None:
            return None
        data = run.config.task.prepare_data(run.loaded.data)
        stack.pop_all()  # `fit_run` closes the directory
    return fit_run(run, data, run_resources, directory)


def train_several(
    experiment: Experiment,
    config: SeveralRuns,
    workdir: pathlib.Path,
    options: Options,
    loaded: Loaded,
) -> Record | None:
    """Train the runs of an experiment one after another, and report their results.

    A run that is already finished is not trained again.

    Args:
      experiment: The experiment.
      config: Config of the experiment, with the overrides of the command line.
      workdir: Directory of the experiment, in which every run has a directory.
      options: Options of the command line.
      loaded: Data set of all runs.

    Returns:
      The content of summary.json, or None if the user stopped the training.
    """
    workdir = workdir.absolute()
    parts = parts_of(config, workdir)
    runs = {
        part: Run(experiment.name, parts[part], workdir / part, loaded, options, part)
        for part in parts
    }
    check_several(config, runs)
    check_parts(workdir, experiment.name, parts)
    record = record_of(experiment.name, config, config.data, loaded, options)
    with opened(workdir, record, marked_paths(config, MAY_CHANGE), defaults_by_path(config)):
        summaries = {}
        for part, run in runs.items():
            summary = train_run(run)
            if summary is None:
                return None
            summaries[part] = summary
        return report(experiment, config, summaries, Context(workdir, options, loaded))


def check_several(config: SeveralRuns, runs: dict[str, Run]) -> None:
    """Check every run of an experiment, and the runs that its config names, before any training.

    Args:
      config: Config of the experiment.
      runs: Runs by the names of their directories.

    Raises:
      UserError: If fields contradict each other, a run does not fit into memory, or a run that a
        config names does not exist.
    """
    pending = {str(run.workdir) for run in runs.values()}
    bound = {part: run.bound() for part, run in runs.items()}
    configs = {part: run.config for part, run in bound.items()}
    for part, run in bound.items():
        with full_paths(config, run.config):
            complete = config.complete(part, configs)
            check(run._replace(config=resources.prepare(complete, run.loaded, pending)))


@contextlib.contextmanager
def full_paths(config: AnyConfig, part: Config | None = None) -> Iterator[None]:
    """Replace field paths in errors of the body by their paths in the experiment's config.

    For example, `--config.train.steps` of the run `text`, which is one of several runs, becomes
    `--config.text.train.steps`.

    Args:
      config: Config of the experiment.
      part: Config of the run that the body checks; if None, the body concerns all runs.

    Raises:
      ConfigError: If the body raises a UserError.
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
                others = tuple(f"{name}.{path}" for path in others)
        raise ConfigError(message, *others) from None


def report(
    experiment: Experiment, config: SeveralRuns, summaries: dict[str, Record], context: Context
) -> Record:
    """Print and write the results of an experiment of several runs; return its summary.

    Args:
      experiment: The experiment.
      config: Config of the experiment.
      summaries: Contents of the runs' summary.json by the names of their directories.
      context: Directory, options and data set of the experiment.
    """
    assert experiment.report is not None
    result = experiment.report(config, summaries, context)
    summary = {"experiment": experiment.name, "data": context.loaded.data.title, **result.record}
    if not is_main():
        return summary
    print_result(plots.table(result.rows, result.title))
    images = context.workdir / "images"
    for name, figure in result.figures.items():
        with reporting_write_errors(context.workdir):
            plots.save_png(images / f"{name}.png", figure)
    path = context.workdir / "summary.json"
    write_json(path, summary)
    print_result(f"  images in {images}, metrics in {path}")
    return summary
