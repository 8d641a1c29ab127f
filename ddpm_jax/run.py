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
import functools
import logging
import os
import pathlib
import time
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from ddpm_jax import parallel as devices
from ddpm_jax import preflight, report, train
from ddpm_jax.checkpoint import check_store, open_checkpoints
from ddpm_jax.config import FROM_DATA, MAY_CHANGE, marked, restore
from ddpm_jax.data.loader import (
    ENDLESS,
    Data,
    MissingData,
    Split,
    cache_dir,
    check_recorded_dir,
    is_of_tfds,
    load,
)
from ddpm_jax.errors import RunError, UserError, printable
from ddpm_jax.files import check_writable, is_writable
from ddpm_jax.keys import SAMPLE, example_keys, purpose_key
from ddpm_jax.progress import print_result, tell
from ddpm_jax.rundir import (
    RunDir,
    bystander,
    can_write,
    check_entries,
    check_same,
    open_run,
    provenance,
    read_record,
    write_json,
)
from ddpm_jax.samples import SampleFile, check_out
from ddpm_jax.tasks import Evaluation, Request

SAMPLE_BATCH = 64
SHOWN_CLASSES = 20  # names at the start of a run
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
    devices.check_flags(os.environ.get("XLA_FLAGS", ""))
    devices.tune_cpu(debug)
    if deterministic:
        devices.tune_gpu()
    if cluster is not None:
        devices.initialize(*cluster)
    devices.check_platform()
    jax.config.update("jax_disable_most_optimizations", debug)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what is the user's business is told here
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the user's own choice
        kept = is_writable(cache_dir() / "xla")
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
        recorded = earlier.get("data_dir")
        where = options.data_dir or (recorded if isinstance(recorded, str) else None)
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
    return loaded


def load_again(
    record: dict[str, Any], options: Options, validation: int | None, moved: str | None = None
) -> Data:
    """Load the data of an earlier run.

    A record may be a stranger's.  Its `data_dir` is read only for data sets that TFDS itself knows,
    and nothing is prepared there.

    Args:
      record: what config.json says of the run.
      options: whose `data_dir` goes before the recorded one.
      validation: as `load` takes it.
      moved: the name of the data today; None: as it was.

    Raises:
      UserError: they are not where they were, or the record does not say where.
    """
    name, where = moved or record["data"].get("name"), options.data_dir
    if not isinstance(name, str):
        raise UserError("config.json names no data set; it is damaged, or of another version")
    recorded = record.get("data_dir")
    if is_of_tfds(name) and not where and recorded is not None:
        check_recorded_dir(name, recorded)
        return _load(name, recorded, bool(record.get("debug")), validation, may_prepare=False)
    source, _, argument = name.partition(":")
    if source == "folder" and not moved and not os.path.isdir(os.path.expanduser(argument)):
        raise UserError(
            f"the folder {printable(argument)}, where the data of this run were, is not there; "
            "give its new place as --config.data=folder:PATH"
        )
    return _load(name, where, bool(record.get("debug")), validation)


def _load(
    name: str,
    data_dir: str | None,
    debug: bool,
    validation: int | None,
    may_prepare: bool = True,
) -> Data:
    data = load(name, data_dir, validation, may_prepare)
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
        "data_dir": loaded.data_dir and os.path.abspath(os.path.expanduser(loaded.data_dir)),
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
        summary = devices.from_main(lambda: preflight.read_summary(workdir))
        if summary is not None and step == summary.get("step") == config.steps:
            _tell_finished(workdir, summary)
            return summary
        devices.from_main(lambda: check_store(workdir / "checkpoints"))
        _tell_start(name, loaded, workdir)
        devices.from_main(run.write_record)
        spread = devices.make(options.parallel)
        watch = train.Watch(options.profile, options.wandb)
        result = train.fit(task, config, data, run, checkpoints, options.seed, spread, watch)
        devices.from_main(run.check_there)
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
            "about": _about(result.final, config),
            "metrics": result.final.metrics,
        }
        devices.from_main(lambda: run.finish(summary, f"{name} on {data.title}"))
        _tell_finished(workdir, summary)
        print_result(f"  {time.perf_counter() - started:.0f} s in all")
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

    def check() -> None:
        check_entries(workdir)
        for folder in (workdir / "images", workdir):
            check_writable(folder, "--mode=eval")

    devices.from_main(check)
    config, state = load_state(experiment, workdir, config, options.parallel)
    record = read_record(workdir) or {}
    moved = config.data if config.data != record["config"].get("data") else None
    data = load_again(record, options, config.validation, moved)
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

    devices.from_main(lambda: _write_evaluation(workdir, found, written))
    title = f"{record['experiment']} on {data.title}, checkpoint of step {step}"
    print_result(report.table(report.metric_rows(found.metrics), title))
    print_result(f"  pictures in {workdir / 'images'}, figures in {workdir / 'eval.json'}")
    return found.metrics


def _write_evaluation(workdir: pathlib.Path, found: Evaluation, written: dict) -> None:
    """Write eval.json and the pictures of an evaluation."""
    check_entries(workdir)
    for name, picture in found.pictures.items():
        if isinstance(picture, report.NonFinite):
            raise RunError(f"no picture {name}: {picture}")
        try:
            report.save_picture(workdir / "images" / name, picture)
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    write_json(workdir / "eval.json", written)


def sample_experiment(
    experiment: types.ModuleType,
    config: Any,
    workdir: pathlib.Path,
    options: Options,
    request: Request,
    count: int,
    out: pathlib.Path | None,
    prompts: tuple[str, ...] = (),
    overwrite: bool = False,
) -> pathlib.Path:
    """Draw images with the newest checkpoint's averaged parameters, into a .png or .npz.

    Image i is the same whatever `count` is, and another with every `--seed`.

    Args:
      count: how many images; of each of `prompts`, if there are any, a row of a .png each.
      overwrite: replace a file that this program did not write.

    Raises:
      RunError: the images are not finite, or cannot be written.
    """
    default = workdir / "images" / "drawn.png"
    out = out or default

    def check() -> None:
        check_entries(workdir)
        check_out(out, default, overwrite)

    devices.from_main(check)
    config, state = load_state(experiment, workdir, config, options.parallel)
    task = experiment.build(config)
    key = purpose_key(options.seed, SAMPLE)
    spread = devices.make(options.parallel)
    params, size = train.averaged(state, config), spread.round_up(SAMPLE_BATCH)
    texts = prompts or (request.prompt,)
    file = SampleFile(out, texts, count)
    batches = len(texts) * -(-count // size)
    spread = _logging_first(
        spread,
        f"sampling {file.total} images in {batches} batch{'es' * (batches > 1)} of {size}; the "
        "program for it is compiled first",
    )
    try:
        with file.kept() as clock:
            for text in texts:
                asked = request._replace(prompt=text)
                for start in range(0, count, size):  # one shape, compiled once
                    keys = example_keys(key, 0, spread.indices(start, size))
                    images = devices.fetch(task.sample(params, state.fixed, keys, asked, spread))
                    labels = task.labels and devices.fetch(task.labels(keys, asked))
                    own = slice(count - start)
                    file.add(images[own], None if labels is None else labels[own])
                    if file.total > size:
                        clock.show(file.size)
    except report.NonFinite as error:
        raise RunError(
            f"{error}: the sampler diverged; try another --guidance, --steps or --sampler"
        ) from None
    with can_write(out):
        devices.from_main(file.write)
    name = experiment.__name__.rpartition(".")[2]
    print_result(f"{file.size} images of {name}, step {int(state.step)}: {out}")
    return out


def _logging_first(spread: devices.Parallel, line: str) -> devices.Parallel:
    """The same, but it logs a line before the first program is compiled.

    By then a task has checked what it was asked for.
    """
    log = functools.cache(tell)

    def compile(*arguments: Any, **options: Any) -> Any:
        log(line)
        return spread.compile(*arguments, **options)

    return spread._replace(compile=compile)


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
        f"{height}x{width}x{channels}, {data.levels} levels, {_classes(data.classes)}\n"
        f"{here['count']} x {here['kind']} ({here['platform']}); everything goes to {workdir}"
    )
    for note in data.notes:
        tell(f"{data.title}: {note}")
    _shout(loaded.note)


def _classes(names: tuple[str, ...]) -> str:
    """How many classes there are, and the first of them."""
    if not names:
        return "no classes"
    shown = ", ".join(printable(name) for name in names[:SHOWN_CLASSES])
    return f"{len(names)} classes: {shown}" + ", ..." * (len(names) > SHOWN_CLASSES)


def _held_out(data: Data) -> str:
    return f"{len(data.validation.images)} to validate on, " if data.validation else ""


def _size(split: Split) -> str:
    count = len(split.images)
    return "endless" if count == ENDLESS else str(count)


def _tell_finished(workdir: pathlib.Path, summary: dict) -> None:
    title = f"{summary['experiment']} on {summary['data']}, step {summary['step']}"
    rows = report.metric_rows(summary["metrics"])
    rows.append(("parameters", f"{summary['parameters']:,}"))
    print_result(report.table(rows, title))
    print_result(f"  pictures in {workdir / 'images'}, figures in {workdir / 'summary.json'}")
    _shout(summary["data_note"])


def _shout(line: str) -> None:
    if line:
        tell(f"{'!' * 80}\n{printable(line)}\n{'!' * 80}")


def _count(params: Any) -> int:
    return sum(array.size for array in jax.tree.leaves(params))
