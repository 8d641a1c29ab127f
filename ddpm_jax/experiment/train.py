"""Train one run: open its directory, train, evaluate and summarise."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from ddpm_jax import plots
from ddpm_jax.config import marked_paths
from ddpm_jax.config_records import defaults_by_path
from ddpm_jax.data.types import Data
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import preflight, sizes
from ddpm_jax.experiment.announce import log_loudly, log_start
from ddpm_jax.experiment.inputs import record_of
from ddpm_jax.experiment.recorded import check_average
from ddpm_jax.experiment.types import Run, checked_task
from ddpm_jax.fields import MAY_CHANGE
from ddpm_jax.parallel import processes
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.progress import log, print_result
from ddpm_jax.system.record import Record
from ddpm_jax.task import Resources
from ddpm_jax.training import loop
from ddpm_jax.training.checkpoint import check_can_store, open_checkpoints
from ddpm_jax.training.evaluation import describe_evaluation
from ddpm_jax.training.run_dir import RunDir, non_writing_run_dir, open_run


def check(run: Run) -> None:
    """Check a run, whose config is bound to its data set, before it is trained.

    Raises:
      UserError: If the batch cannot be divided among the devices, fields contradict each other, or
        the run does not fit into memory.
    """
    train = run.config.train
    devices.check_batch(train.batch_size, train.grad_accum_steps)
    check_average(run.config)
    sizes.check_sizes(checked_task(run.config), run.config, run.options.parallel)


def record(run: Run) -> Record:
    """Return the content of config.json for a run."""
    config, loaded = run.config, run.loaded
    return record_of(run.name, config, config.data, loaded, run.options, run.part)


def open_directory(run: Run) -> RunDir:
    """Create or open the directory of a run, and lock it."""
    may_change = marked_paths(run.config, MAY_CHANGE)
    return open_run_dir(run.workdir, record(run), may_change, defaults_by_path(run.config))


def fit_run(run: Run, data: Data, resources: Resources, directory: RunDir) -> Record | None:
    """Train and evaluate a run; return its summary.json, or None if the user stopped it.

    Args:
      run: Run whose config is bound to its data set.
      data: Data set of the run, as `Task.prepare_data` returns it.
      resources: Functions that load the networks of other runs that the task uses.
      directory: Open directory of the run, which is closed at the end.

    Raises:
      UserError: If the newest checkpoint is beyond the last step, or cannot be read.
    """
    started, config, workdir = time.perf_counter(), run.config, run.workdir
    options, steps = run.options, run.config.train.steps
    with contextlib.ExitStack() as stack:
        stack.callback(directory.close)
        task = checked_task(config)
        checkpoints = stack.enter_context(
            contextlib.closing(open_checkpoints(workdir / "checkpoints"))
        )
        step = checkpoints.newest() or 0
        if step > steps:
            raise UserError(
                f"{workdir} is already at step {step}, beyond --config.train.steps={steps}; give a "
                "larger number, or another --workdir"
            )
        summary: Record | None = processes.from_main(lambda: preflight.read_summary(workdir))
        if summary is not None and step == summary.get("step") == steps:
            log_finished(workdir, summary)
            return summary
        processes.from_main(lambda: check_can_store(workdir / "checkpoints"))
        log_start(run.title, run.loaded, workdir)
        processes.from_main(directory.write_record)
        partitioner = devices.make(options.parallel)
        monitoring = loop.Monitoring(options.profile, options.wandb)
        result = loop.fit(
            task,
            config,
            data,
            directory,
            checkpoints,
            options.seed,
            partitioner,
            monitoring,
            resources,
        )
        processes.from_main(directory.check_exists)
        if result.step:
            checkpoints.check_written(result.step)  # it is written during the evaluation
        if result.final is None:
            log(f"stopped at step {result.step} of {steps}; the same command resumes the run")
            return None
        directory.time(result.step, run_seconds=time.perf_counter() - started)
        summary = {
            "experiment": run.title,
            "step": result.step,
            "data": data.title,
            "data_note": run.loaded.note,
            "parameters": _count(result.state.params),
            "about": describe_evaluation(result.final, config),
            "metrics": result.final.metrics,
        }
        processes.from_main(lambda: directory.finish(summary, f"{run.title} on {data.title}"))
        log_finished(workdir, summary)
        print_result(f"  total time {time.perf_counter() - started:.0f} s")
        return summary


def train_alone(run: Run, data: Data) -> Record | None:
    """Train a run, bound to its data set, that uses no other run; return what `fit_run` returns."""
    check(run)
    return fit_run(run, data, Resources(), open_directory(run))


@contextlib.contextmanager
def opened(
    workdir: pathlib.Path, record: Record, may_change: set[str], defaults: Record
) -> Iterator[None]:
    """Open the directory of an experiment of several runs, and lock it during the body.

    Args:
      workdir: Directory of the experiment.
      record: Content of config.json for the experiment.
      may_change: Paths of config fields that may differ from an earlier run in the directory.
      defaults: Defaults of the config fields by path.
    """
    with contextlib.closing(open_run_dir(workdir, record, may_change, defaults)) as directory:
        processes.from_main(directory.write_record)
        yield


def open_run_dir(
    workdir: pathlib.Path, record: Record, may_change: set[str], defaults: Record
) -> RunDir:
    """Create or open a run directory, and lock it; only process 0 writes to the directory.

    Args:
      workdir: Directory of the run.
      record: Content of config.json for the run.
      may_change: Paths of config fields that may differ from an earlier run in the directory.
      defaults: Defaults of the config fields by path.
    """
    directory: RunDir = processes.on_main(
        lambda: open_run(workdir, record, may_change, defaults),
        non_writing_run_dir(workdir, record),
    )
    return directory


def log_finished(workdir: pathlib.Path, summary: Record) -> None:
    """Print the final metrics of a run and the paths of its results."""
    title = f"{summary['experiment']} on {summary['data']}, step {summary['step']}"
    rows = plots.metric_rows(summary["metrics"])
    rows.append(("parameters", f"{summary['parameters']:,}"))
    print_result(plots.table(rows, title))
    print_result(f"  images in {workdir / 'images'}, metrics in {workdir / 'summary.json'}")
    log_loudly(summary["data_note"])


def _count(params: PyTree) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
