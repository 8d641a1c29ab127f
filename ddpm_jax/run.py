"""One experiment from its config to its table: what `launch.py` and sweeps call.

An experiment is a module with `Config`, `DEBUG` (what `--debug` changes) and either
`build(config) -> Task`, which the functions here train, evaluate and sample from, or
`run(config, workdir, options)`, which does as it likes.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import parallel as devices
from ddpm_jax import report, train
from ddpm_jax.checkpoint import open_checkpoints
from ddpm_jax.config import FROM_DATA, MAY_CHANGE, marked
from ddpm_jax.data.loader import Batch, Data, MissingData, cache_dir, load
from ddpm_jax.errors import UserError
from ddpm_jax.keys import SAMPLE, example_keys, purpose_key
from ddpm_jax.rundir import check_same, open_run, provenance, read_record
from ddpm_jax.tasks import Request, Task

SAMPLE_BATCH = 64


class Options(NamedTuple):
    """What the command line says besides the config."""

    seed: int = 0
    parallel: str = "jit"
    data_dir: str | None = None
    strict_data: bool = False
    debug: bool = False


def set_up_jax() -> None:
    """Fast convolutions on a CPU, and compiled programs kept between runs."""
    devices.tune_cpu()
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def load_data(experiment: types.ModuleType, name: str, options: Options) -> tuple[Data, str]:
    """The data set, or the experiment's `FALLBACK` in its place; and a line that says so.

    Raises:
      UserError: it cannot be had, and there is no fallback or `--strict_data`.
    """
    fallback = getattr(experiment, "FALLBACK", None)
    try:
        data, line = load(name, options.data_dir), ""
    except MissingData as error:
        if fallback is None or options.strict_data or name != experiment.Config().data:
            raise
        data = load(fallback, options.data_dir)
        line = f"NOT {name}, which is not at hand, but {data.title}: the figures are of these. "
        line += f"({error})"
    for note in data.notes:
        print(f"{data.title}: {note}", file=sys.stderr)
    return data, line


def from_data(config: Any, data: Data) -> Any:
    """The config with the fields that the data set decides."""
    known = {"shape": data.shape, "levels": data.levels, "classes": len(data.classes)}
    names = marked(config, FROM_DATA)
    return dataclasses.replace(config, **{name: known[name] for name in names})


def train_experiment(
    experiment: types.ModuleType, config: Any, workdir: pathlib.Path, options: Options
) -> dict[str, Any] | None:
    """Train to the end, evaluate, draw; returns the summary, or None if it was stopped."""
    started = time.perf_counter()
    name = experiment.__name__.rpartition(".")[2]
    data, fallback = load_data(experiment, config.data, options)
    config = from_data(config, data)
    task = experiment.build(config)
    record = {
        "experiment": name,
        "config": dataclasses.asdict(config),
        "seed": options.seed,
        "debug": options.debug,
        "data": data.describe(),
        "data_asked_for": config.data,
        "parallel": options.parallel,
        "devices": devices.describe(),
        **provenance(),
    }
    run = open_run(workdir, record, marked(config, MAY_CHANGE))
    checkpoints = open_checkpoints(workdir / "checkpoints")
    with contextlib.closing(run), contextlib.closing(checkpoints):
        step = checkpoints.newest() or 0
        if step > config.steps:
            raise UserError(
                f"{workdir} is at step {step} already, beyond --config.steps={config.steps}"
            )
        summary = run.summary()
        if summary is not None and step == summary["step"] == config.steps:
            _tell_finished(workdir, summary)
            return summary
        _tell_start(name, data, fallback, workdir)
        run = run.at(step)
        result = train.fit(task, config, data, run, checkpoints, options.seed, options.parallel)
        if result.step < config.steps:
            print(
                f"stopped at step {result.step} of {config.steps}; the same command goes on",
                file=sys.stderr,
            )
            return None
        trained = time.perf_counter() - started
        print("evaluating", file=sys.stderr)
        shard = devices.make(options.parallel).shard
        metrics = train.evaluate(
            task, result.state, data, run, result.step, options.seed, shard, full=True
        )
        run.time(result.step, run_seconds=trained, total_seconds=time.perf_counter() - started)
        report.curves(workdir / "images" / "curves.png", run.lines(), f"{name} on {data.title}")
        summary = {
            "experiment": name,
            "step": result.step,
            "data": data.title,
            "data_note": fallback,
            "parameters": _count(result.state.params),
            "metrics": metrics,
        }
        run.finish(summary)
        _tell_finished(workdir, summary)
        print(f"  {trained:.0f} s to the last step, {time.perf_counter() - started:.0f} s in all")
        return summary


def eval_experiment(
    experiment: types.ModuleType, config: Any, workdir: pathlib.Path, options: Options
) -> dict[str, float]:
    """Evaluate the newest checkpoint in full; writes eval.json and pictures."""
    with _trained(experiment, config, workdir) as (task, config, record, state):
        data, _ = load_data(experiment, record["data"]["name"], options)
        check_same(workdir, record, {**record, "data": data.describe()})
        shard = devices.make(options.parallel).shard
        found = task.evaluate(
            state.ema, state.fixed, data, seed=record["seed"], full=True, shard=shard
        )
        step = int(state.step)
        for name, picture in found.pictures.items():
            report.save_png(workdir / "images" / f"{name}.png", picture)
        written = {"step": step, "data": data.title, "metrics": found.metrics}
        (workdir / "eval.json").write_text(json.dumps(written, indent=2) + "\n")
        title = f"{record['experiment']} on {data.title}, checkpoint of step {step}"
        print(report.table(report.metric_rows(found.metrics), title))
        print(f"  pictures in {workdir / 'images'}, figures in {workdir / 'eval.json'}")
        return found.metrics


def sample_experiment(
    experiment: types.ModuleType,
    config: Any,
    workdir: pathlib.Path,
    options: Options,
    request: Request,
    count: int,
    out: pathlib.Path | None,
) -> pathlib.Path:
    """Draw images with the newest checkpoint's averaged parameters, into a .png or .npz.

    Image i is the same whatever `count` is, and another with every `--seed`.
    """
    out = out or workdir / "images" / "drawn.png"
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out={out}: must end in .png or .npz")
    if not out.parent.is_dir() and out.parent != workdir / "images":
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    with _trained(experiment, config, workdir) as (task, _, record, state):
        key = purpose_key(options.seed, SAMPLE)
        parts = []
        for start in range(0, count, SAMPLE_BATCH):  # one shape, compiled once
            keys = example_keys(key, 0, jnp.arange(start, start + SAMPLE_BATCH))
            parts.append(np.asarray(task.sample(state.ema, state.fixed, keys, request)))
        images = np.concatenate(parts)[:count]
        try:
            if out.suffix == ".npz":
                np.savez_compressed(out, images=report.to_uint8(images))
            else:
                report.save_png(out, report.grid(images))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None
        print(f"{count} images of {record['experiment']}, step {int(state.step)}: {out}")
        return out


@contextlib.contextmanager
def _trained(
    experiment: types.ModuleType, config: Any, workdir: pathlib.Path
) -> Iterator[tuple[Task, Any, dict, train.TrainState]]:
    """The task, config, record and newest state of a run directory."""
    record = read_record(workdir)
    if record is None:
        raise UserError(f"there is no run in {workdir}; train one first, or give --workdir")
    folder = workdir / "checkpoints"
    if not any(folder.glob("[0-9]*")):
        raise UserError(f"there is no checkpoint in {workdir} yet; train first")
    task = experiment.build(config)
    checkpoints = open_checkpoints(folder, read_only=True)
    with contextlib.closing(checkpoints):
        step = checkpoints.newest()
        if step is None:
            raise UserError(f"there is no checkpoint in {workdir} yet; train first")
        examples = Batch(
            np.zeros((2, *config.shape), np.uint8), np.zeros(2, np.int32), np.arange(2)
        )
        like = jax.eval_shape(lambda: train.init_state(task, config, examples, record["seed"]))
        state, _ = checkpoints.restore(step, like)
        yield task, config, record, state


def _tell_start(name: str, data: Data, fallback: str, workdir: pathlib.Path) -> None:
    here = devices.describe()
    height, width, channels = data.shape
    print(
        f"{name} on {data.title}: {len(data.train.images)} images to train on, "
        f"{len(data.test.images)} to test on, {height}x{width}x{channels}, {data.levels} levels\n"
        f"{here['count']} x {here['kind']} ({here['platform']}); everything goes to {workdir}",
        file=sys.stderr,
    )
    _shout(fallback)


def _tell_finished(workdir: pathlib.Path, summary: dict) -> None:
    title = f"{summary['experiment']} on {summary['data']}, step {summary['step']}"
    rows = report.metric_rows(summary["metrics"])
    rows.append(("parameters", f"{summary['parameters']:,}"))
    print(report.table(rows, title))
    print(f"  pictures in {workdir / 'images'}, figures in {workdir / 'summary.json'}")
    _shout(summary["data_note"])


def _shout(line: str) -> None:
    if line:
        print(f"{'!' * 80}\n{line}\n{'!' * 80}", file=sys.stderr)


def _count(params: Any) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
