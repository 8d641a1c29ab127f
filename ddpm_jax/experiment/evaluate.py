"""Evaluate a trained run on a split."""

import pathlib
import types
from typing import Any

from ddpm_jax import errors, plots
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.experiment.inputs import (
    Options,
    dress_data,
    load_again,
    prepare_config,
    pretrain_config,
)
from ddpm_jax.experiment.load import load_state
from ddpm_jax.parallel import processes
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.progress import print_result
from ddpm_jax.system.files import check_writable
from ddpm_jax.task import Evaluation
from ddpm_jax.training import evaluation
from ddpm_jax.training import step as step_module
from ddpm_jax.training.evaluation import describe_evaluation
from ddpm_jax.training.run_dir import (
    check_entries,
    check_same,
    read_record,
    write_json,
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

    processes.from_main(check)
    config, state = load_state(experiment, workdir, config, options.parallel)
    record = read_record(workdir) or {}
    moved = config.data if config.data != record["config"].get("data") else None
    data = load_again(record, options, config.validation, moved)
    check_same(workdir, record, {**record, "data": data.describe()})
    loaded = Loaded(data, data_dir=options.data_dir or record.get("data_dir"))
    options = options._replace(debug=record.get("debug", False))
    config = pretrain_config(
        experiment, prepare_config(experiment, config, loaded, options), loaded, options
    )
    if config is None:
        return {}
    task, data = experiment.build(config), dress_data(experiment, config, data)
    spread = devices.make(options.parallel)
    params = step_module.averaged(state, config)
    found = evaluation.evaluated(
        task, params, state.fixed, data, options.split, record["seed"], True, spread
    )
    step = int(state.step)
    written = {
        "step": step,
        "data": data.title,
        "split": options.split,
        "about": describe_evaluation(found, config),
        "metrics": found.metrics,
    }

    processes.from_main(lambda: _write_evaluation(workdir, found, written))
    title = f"{record['experiment']} on {data.title}, checkpoint of step {step}"
    print_result(plots.table(plots.metric_rows(found.metrics), title))
    print_result(f"  pictures in {workdir / 'images'}, figures in {workdir / 'eval.json'}")
    return found.metrics


def _write_evaluation(workdir: pathlib.Path, found: Evaluation, written: dict) -> None:
    """Write eval.json and the pictures of an evaluation."""
    check_entries(workdir)
    for name, picture in found.pictures.items():
        if isinstance(picture, errors.NonFinite):
            raise RunError(f"no picture {name}: {picture}")
        try:
            plots.save_picture(workdir / "images" / name, picture)
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    write_json(workdir / "eval.json", written)
