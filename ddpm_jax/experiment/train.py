"""Train one experiment: open its directory, train, evaluate and summarise."""

import contextlib
import pathlib
import time
import types
from collections.abc import Iterator
from typing import Any

import jax

from ddpm_jax import plots
from ddpm_jax.config import marked, to_record
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import preflight
from ddpm_jax.experiment.announce import log_loudly, log_start
from ddpm_jax.experiment.inputs import (
    Options,
    dress_data,
    from_data,
    load_data,
    prepare_config,
    pretrain_config,
    record_of,
)
from ddpm_jax.fields import MAY_CHANGE
from ddpm_jax.parallel import processes
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.progress import print_result, tell
from ddpm_jax.training import ema, loop
from ddpm_jax.training.checkpoint import check_store, open_checkpoints
from ddpm_jax.training.evaluation import describe_evaluation
from ddpm_jax.training.run_dir import (
    RunDir,
    bystander,
    open_run,
)


def train_experiment(
    experiment: types.ModuleType,
    config: Any,
    workdir: pathlib.Path,
    options: Options,
    loaded: Loaded | None = None,
) -> dict[str, Any] | None:
    """Train to the end, evaluate, draw; returns the summary, or None if it was stopped.

    Args:
      loaded: the data, where the caller has them already.
    """
    started = time.perf_counter()
    name = experiment.__name__.rpartition(".")[2]
    loaded = loaded or load_data(experiment, config, workdir, options)
    data = loaded.data
    devices.check_batch(config.batch_size, config.accumulate)
    ema.check_ema(config)
    config = prepare_config(experiment, from_data(config, data), loaded, options)
    preflight.check_sizes(experiment.build(config), config, options.parallel)
    record = record_of(name, config, loaded, options)
    run = open_run_dir(workdir, record, marked(config, MAY_CHANGE))
    checkpoints = None
    try:
        config = pretrain_config(experiment, config, loaded, options)
        if config is None:
            return None
        run.record["config"] = to_record(config)
        task, data = experiment.build(config), dress_data(experiment, config, data)
        checkpoints = open_checkpoints(workdir / "checkpoints")
        step = checkpoints.newest() or 0
        if step > config.steps:
            raise UserError(
                f"{workdir} is at step {step} already, beyond --config.steps={config.steps}"
            )
        summary = processes.from_main(lambda: preflight.read_summary(workdir))
        if summary is not None and step == summary.get("step") == config.steps:
            log_finished(workdir, summary)
            return summary
        processes.from_main(lambda: check_store(workdir / "checkpoints"))
        log_start(name, loaded, workdir)
        processes.from_main(run.write_record)
        spread = devices.make(options.parallel)
        watch = loop.Watch(options.profile, options.wandb)
        result = loop.fit(task, config, data, run, checkpoints, options.seed, spread, watch)
        processes.from_main(run.check_there)
        if result.step:
            checkpoints.check_written(result.step)  # while the evaluation went on
        if result.final is None:
            tell(f"stopped at step {result.step} of {config.steps}; the same command goes on")
            return None
        run.time(result.step, run_seconds=time.perf_counter() - started)
        summary = {
            "experiment": name,
            "step": result.step,
            "data": data.title,
            "data_note": loaded.note,
            "parameters": _count(result.state.params),
            "about": describe_evaluation(result.final, config),
            "metrics": result.final.metrics,
        }
        processes.from_main(lambda: run.finish(summary, f"{name} on {data.title}"))
        log_finished(workdir, summary)
        print_result(f"  {time.perf_counter() - started:.0f} s in all")
        return summary
    finally:
        if checkpoints is not None:
            checkpoints.close()
        run.close()


@contextlib.contextmanager
def opened(workdir: pathlib.Path, record: dict[str, Any], may_change: set[str]) -> Iterator[None]:
    """A directory of several runs, this process's or the first one's while it is used."""
    with contextlib.closing(open_run_dir(workdir, record, may_change)) as sweep:
        processes.from_main(sweep.write_record)
        yield


def open_run_dir(workdir: pathlib.Path, record: dict[str, Any], may_change: set[str]) -> RunDir:
    """The run directory, opened by the first process; the others write nothing."""
    return processes.from_main_alone(
        lambda: open_run(workdir, record, may_change), bystander(workdir, record)
    )


def log_finished(workdir: pathlib.Path, summary: dict) -> None:
    title = f"{summary['experiment']} on {summary['data']}, step {summary['step']}"
    rows = plots.metric_rows(summary["metrics"])
    rows.append(("parameters", f"{summary['parameters']:,}"))
    print_result(plots.table(rows, title))
    print_result(f"  pictures in {workdir / 'images'}, figures in {workdir / 'summary.json'}")
    log_loudly(summary["data_note"])


def _count(params: Any) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
