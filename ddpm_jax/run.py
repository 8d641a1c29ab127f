"""One experiment from its config to its table: what `launch.py` and sweeps call.

An experiment is a module with `Config`, `DEBUG` (what `--debug` changes) and either
`build(config) -> Task`, which the functions here train, evaluate and sample from, or
`run(config, workdir, options)`, which does as it likes.  Beside `build` it may have
`prepare(config, loaded, options) -> config`, for what must be there before it trains,
`pretrain` of the same, for what is trained before it, which may take long, and
`dress(config, data) -> data`, for what it sees of the data in another form.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import time
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import parallel as devices
from ddpm_jax import preflight, report, terminal, train
from ddpm_jax.checkpoint import open_checkpoints
from ddpm_jax.config import FROM_DATA, MAY_CHANGE, marked, restore
from ddpm_jax.data.loader import (
    ENDLESS,
    Data,
    MissingData,
    Split,
    cache_dir,
    is_of_tfds,
    load,
)
from ddpm_jax.errors import UserError
from ddpm_jax.keys import SAMPLE, example_keys, purpose_key
from ddpm_jax.progress import tell
from ddpm_jax.rundir import (
    RunDir,
    bystander,
    check_links,
    check_same,
    open_run,
    provenance,
    read_record,
)
from ddpm_jax.tasks import Evaluation, Request

SAMPLE_BATCH = 64
DEBUG_IMAGES = 128  # test images that a --debug run looks at


class Options(NamedTuple):
    """What the command line says besides the config."""

    seed: int = 0
    parallel: str = "jit"
    data_dir: str | None = None
    strict_data: bool = False
    debug: bool = False
    profile: bool = False
    wandb: bool = False
    split: str = "test"  # that --mode=eval evaluates on


def set_up_jax(
    debug: bool = False,
    cluster: tuple[str | None, int | None, int | None] | None = None,
    deterministic: bool = False,
) -> None:
    """Fast convolutions on a CPU, compiled programs kept between runs, and the other processes.

    Args:
      debug: compile in half the time programs that are slower, for runs of a few steps.
      cluster: the coordinator's HOST:PORT, how many processes there are, and which this is; None
        in it is asked of the cluster.
      deterministic: the same bits at each run on a GPU, which costs speed.
    """
    devices.tune_cpu(debug)
    if deterministic:
        devices.tune_gpu()
    if cluster is not None:
        devices.initialize(*cluster)
    devices.check_platform()
    jax.config.update("jax_disable_most_optimizations", debug)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what is the user's business is told here
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the user's own choice
        kept = preflight.can_write(cache_dir() / "xla")
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla") if kept else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


class Loaded(NamedTuple):
    """A data set, and what is to be shouted of it: that it is not the one asked for."""

    data: Data
    note: str = ""
    data_dir: str | None = None  # where it was read


def load_data(
    experiment: types.ModuleType, config: Any, workdir: pathlib.Path, options: Options
) -> Loaded:
    """The data set that `config` names, or the experiment's `FALLBACK` in its place.

    A run that is there already goes on with the data it has, whatever is at hand today.

    Raises:
      UserError: it cannot be had, and there is no fallback or `--strict_data`.
    """
    name, earlier = config.data, read_record(workdir)
    if earlier is not None and earlier.get("data_asked_for") == name:
        again = load_again(earlier, options, config.validation)
        where = options.data_dir or earlier.get("data_dir")
        loaded = Loaded(again, earlier.get("data_note", ""), where)
    else:
        fallback = getattr(experiment, "FALLBACK", None)
        try:
            data = _load(name, options.data_dir, options.debug, config.validation)
            loaded = Loaded(data, data_dir=options.data_dir)
        except MissingData as error:
            if fallback is None or options.strict_data or name != experiment.Config().data:
                raise
            data = _load(fallback, options.data_dir, options.debug, config.validation)
            loaded = Loaded(
                data,
                f"NOT {name}, which is not at hand, but {data.title}: the figures are of these. "
                f"({error})",
                options.data_dir,
            )
    devices.check_same_everywhere("the data set", loaded.data.fingerprint)
    for note in loaded.data.notes:
        tell(f"{loaded.data.title}: {note}")
    return loaded


def load_again(record: dict[str, Any], options: Options, validation: int | None) -> Data:
    """The data of an earlier run, from where it was or from --data_dir.

    Nothing is prepared in a folder that the record names: it may be a stranger's.
    """
    where, name = options.data_dir or record.get("data_dir"), record["data"]["name"]
    if where and not options.data_dir and is_of_tfds(name):
        folder = pathlib.Path(where) / name.partition("/")[0].partition(":")[0]
        if not folder.is_dir():
            raise UserError(
                f"{where}, where the data of this run were, holds no {name}; give --data_dir"
            )
    return _load(name, where, record.get("debug", False), validation)


def _load(name: str, data_dir: str | None, debug: bool, validation: int | None) -> Data:
    data = load(name, data_dir, validation)
    if not debug:
        return data
    if data.validation is not None:
        data = data._replace(validation=data.validation.first(DEBUG_IMAGES))
    return data._replace(test=data.test.first(DEBUG_IMAGES))


def load_for(config: Any, like: Loaded, options: Options) -> Data:
    """The same data set as `like`, with the validation split that another config asks for."""
    return _load(like.data.name, like.data_dir, options.debug, config.validation)


def from_data(config: Any, data: Data) -> Any:
    """The config with the fields that the data set decides."""
    known = {
        "shape": data.shape,
        "levels": data.levels,
        "classes": len(data.classes),
        "caption_length": data.caption_length,
    }
    names = marked(config, FROM_DATA)
    return dataclasses.replace(config, **{name: known[name] for name in names})


def own_config(experiment: types.ModuleType, debug: bool, **fields: Any) -> Any:
    """An experiment's config for one that trains it in passing, with `fields`; tiny to debug."""
    return experiment.Config(**{**(experiment.DEBUG if debug else {}), **fields})


def record_of(name: str, config: Any, loaded: Loaded, options: Options) -> dict[str, Any]:
    """What config.json says of a run."""
    return {
        "experiment": name,
        "config": dataclasses.asdict(config),
        "seed": options.seed,
        "debug": options.debug,
        "data": loaded.data.describe(),
        "data_asked_for": config.data,
        "data_note": loaded.note,
        "data_dir": options.data_dir and str(pathlib.Path(options.data_dir).absolute()),
        "parallel": options.parallel,
        "devices": devices.describe(),
        **provenance(),
    }


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
    train.check_ema(config)
    config = _prepared(experiment, from_data(config, data), loaded, options)
    preflight.check_sizes(experiment.build(config), config, options.parallel)
    record = record_of(name, config, loaded, options)
    run = _open(workdir, record, marked(config, MAY_CHANGE))
    checkpoints = None
    try:
        config = _pretrained(experiment, config, loaded, options)
        if config is None:
            return None
        run.record["config"] = dataclasses.asdict(config)
        task, data = experiment.build(config), _dressed(experiment, config, data)
        checkpoints = open_checkpoints(workdir / "checkpoints")
        step = checkpoints.newest() or 0
        if step > config.steps:
            raise UserError(
                f"{workdir} is at step {step} already, beyond --config.steps={config.steps}"
            )
        devices.from_main(lambda: preflight.check_summary(workdir))
        summary = devices.from_main(run.summary)
        if summary is not None and step == summary.get("step") == config.steps:
            _tell_finished(workdir, summary)
            return summary
        _tell_start(name, loaded, workdir)
        devices.from_main(run.write_record)
        spread = devices.make(options.parallel)
        watch = train.Watch(options.profile, options.wandb)
        result = train.fit(task, config, data, run, checkpoints, options.seed, spread, watch)
        if result.final is None:
            tell(f"stopped at step {result.step} of {config.steps}; the same command goes on")
            return None
        checkpoints.wait()  # written while the evaluation went on
        run.time(result.step, run_seconds=time.perf_counter() - started)
        summary = {
            "experiment": name,
            "step": result.step,
            "data": data.title,
            "data_note": loaded.note,
            "parameters": _count(result.state.params),
            "about": _about(result.final, config),
            "metrics": result.final.metrics,
        }
        devices.from_main(lambda: run.finish(summary, f"{name} on {data.title}"))
        _tell_finished(workdir, summary)
        _say(f"  {time.perf_counter() - started:.0f} s in all")
        return summary
    finally:
        if checkpoints is not None:
            checkpoints.close()
        run.close()


@contextlib.contextmanager
def opened(workdir: pathlib.Path, record: dict[str, Any], may_change: set[str]) -> Iterator[None]:
    """A directory of several runs, this process's or the first one's while it is used."""
    with contextlib.closing(_open(workdir, record, may_change)) as sweep:
        devices.from_main(sweep.write_record)
        yield


def _open(workdir: pathlib.Path, record: dict[str, Any], may_change: set[str]) -> RunDir:
    """The run directory, opened by the first process; the others write nothing."""
    return devices.from_main_alone(
        lambda: open_run(workdir, record, may_change), bystander(workdir, record)
    )


def eval_experiment(
    experiment: types.ModuleType, config: Any, workdir: pathlib.Path, options: Options
) -> dict[str, float]:
    """Evaluate the newest checkpoint in full on a split; writes eval.json and pictures.

    Raises:
      UserError: the run has no validation split, and that is what is asked for.
    """
    if options.split == "validation" and config.validation == 0:
        raise UserError(
            f"--split=validation: the run in {workdir} was trained on all of the training images "
            "(--config.validation=0); give --split=test"
        )
    config, state = load_state(experiment, workdir, config, options.parallel)
    record = read_record(workdir) or {}
    data = load_again(record, options, config.validation)
    check_same(workdir, record, {**record, "data": data.describe()})
    loaded = Loaded(data, data_dir=options.data_dir or record.get("data_dir"))
    options = options._replace(debug=record.get("debug", False))
    config = _pretrained(
        experiment, _prepared(experiment, config, loaded, options), loaded, options
    )
    if config is None:
        return {}
    task, data = experiment.build(config), _dressed(experiment, config, data)
    spread = devices.make(options.parallel)
    params = train.averaged(state, config)
    found = train.evaluated(
        task, params, state.fixed, data, options.split, record["seed"], True, spread
    )
    step = int(state.step)
    written = {
        "step": step,
        "data": data.title,
        "split": options.split,
        "about": _about(found, config),
        "metrics": found.metrics,
    }

    def write() -> None:
        check_links(workdir)
        try:
            for name, picture in found.pictures.items():
                report.save_picture(workdir / "images" / name, picture)
            (workdir / "eval.json").write_text(json.dumps(written, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from None

    devices.from_main(write)
    title = f"{record['experiment']} on {data.title}, checkpoint of step {step}"
    _say(report.table(report.metric_rows(found.metrics), title))
    _say(f"  pictures in {workdir / 'images'}, figures in {workdir / 'eval.json'}")
    return found.metrics


def sample_experiment(
    experiment: types.ModuleType,
    config: Any,
    workdir: pathlib.Path,
    options: Options,
    request: Request,
    count: int,
    out: pathlib.Path | None,
    prompts: tuple[str, ...] = (),
) -> pathlib.Path:
    """Draw images with the newest checkpoint's averaged parameters, into a .png or .npz.

    Image i is the same whatever `count` is, and another with every `--seed`.

    Args:
      count: how many images; of each of `prompts`, if there are any, a row of a .png each.
    """
    out = out or workdir / "images" / "drawn.png"
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out={out}: must end in .png or .npz")
    if not out.parent.is_dir() and out.parent != workdir / "images":
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    config, state = load_state(experiment, workdir, config, options.parallel)
    task = experiment.build(config)
    key = purpose_key(options.seed, SAMPLE)
    spread = devices.make(options.parallel)
    params, size = train.averaged(state, config), spread.round_up(SAMPLE_BATCH)

    def draw(request: Request) -> np.ndarray:
        parts = []
        for start in range(0, count, size):  # one shape, compiled once
            keys = example_keys(key, 0, spread.indices(start, size))
            parts.append(devices.fetch(task.sample(params, state.fixed, keys, request, spread)))
        return np.concatenate(parts)[:count]

    texts: tuple[Any, ...] = prompts or (request.prompt,)
    rows = [draw(request._replace(prompt=text)) for text in texts]
    images = np.concatenate(rows)

    def write() -> None:
        try:
            if out.suffix == ".npz":
                told: Any = {"prompts": np.repeat(prompts, count)} if prompts else {}
                np.savez_compressed(out, images=report.to_uint8(images), **told)
            elif texts == (None,):
                report.save_png(out, report.grid(images))
            else:
                report.save_png(out, report.captioned(list(zip(texts, rows, strict=True))))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None

    devices.from_main(write)
    name = experiment.__name__.rpartition(".")[2]
    _say(f"{len(images)} images of {name}, step {int(state.step)}: {out}")
    return out


def load_state(
    experiment: types.ModuleType,
    workdir: pathlib.Path,
    config: Any = None,
    parallel: str = "jit",
    whole: bool = False,
) -> tuple[Any, train.TrainState]:
    """The config and the newest state of a run directory, for evaluating and drawing.

    None stands in the place of what only training reads, most of a checkpoint, unless `whole`.

    Args:
      config: instead of the recorded one.

    Raises:
      UserError: there is no run, or no checkpoint yet.
    """
    record = read_record(workdir)
    if record is None:
        raise UserError(f"there is no run in {workdir}; train one first, or give --workdir")
    config = config or restore(experiment.Config, record["config"], workdir)
    train.check_ema(config)
    folder = workdir / "checkpoints"
    nothing = UserError(f"there is no checkpoint in {workdir} yet; train first")
    if not any(folder.glob("[0-9]*")):
        raise nothing
    with contextlib.closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        shapes = train.state_shapes(experiment.build(config), config)
        like = devices.make(parallel).like(shapes)
        if not whole:
            like = train.without_training(like, config, ...)
        _, state, _ = checkpoints.restore_newest(like)
        if state is None:
            raise nothing
        return config, state if whole else train.without_training(state, config, None)


def _about(found: Evaluation, config: Any) -> dict[str, Any]:
    """What the record says about an evaluation, with the parameters that it used."""
    return {**found.about, "ema": config.ema, "parameters": train.parameters_used(config)}


def _prepared(experiment: types.ModuleType, config: Any, loaded: Loaded, options: Options) -> Any:
    """The config, with what the experiment's `prepare` found."""
    if not hasattr(experiment, "prepare"):
        return config
    return experiment.prepare(config, loaded, options)


def _pretrained(
    experiment: types.ModuleType, config: Any, loaded: Loaded, options: Options
) -> Any | None:
    """The config, with what the experiment's `pretrain` trained; None: asked to stop."""
    if not hasattr(experiment, "pretrain"):
        return config
    return experiment.pretrain(config, loaded, options)


def _dressed(experiment: types.ModuleType, config: Any, data: Data) -> Data:
    return experiment.dress(config, data) if hasattr(experiment, "dress") else data


def _tell_start(name: str, loaded: Loaded, workdir: pathlib.Path) -> None:
    here, data = devices.describe(), loaded.data
    height, width, channels = data.shape
    tell(
        f"{name} on {data.title}: {_size(data.train)} images to train on, "
        f"{_held_out(data)}{len(data.test.images)} to test on, "
        f"{height}x{width}x{channels}, {data.levels} levels\n"
        f"{here['count']} x {here['kind']} ({here['platform']}); everything goes to {workdir}"
    )
    _shout(loaded.note)


def _held_out(data: Data) -> str:
    return f"{len(data.validation.images)} to validate on, " if data.validation else ""


def _size(split: Split) -> str:
    count = len(split.images)
    return "endless" if count == ENDLESS else str(count)


def _tell_finished(workdir: pathlib.Path, summary: dict) -> None:
    title = f"{summary['experiment']} on {summary['data']}, step {summary['step']}"
    rows = report.metric_rows(summary["metrics"])
    rows.append(("parameters", f"{summary['parameters']:,}"))
    _say(report.table(rows, title))
    _say(f"  pictures in {workdir / 'images'}, figures in {workdir / 'summary.json'}")
    _shout(summary["data_note"])


def _shout(line: str) -> None:
    if line:
        tell(f"{'!' * 80}\n{line}\n{'!' * 80}")


def _say(line: str) -> None:
    """To stdout, from the first process alone."""
    if devices.is_main():
        terminal.show(line)


def _count(params: Any) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
