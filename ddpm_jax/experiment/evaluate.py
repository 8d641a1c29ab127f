"""Evaluate a trained run on its validation split or its test split."""

import pathlib

from ddpm_jax import errors, plots
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.experiment import resources
from ddpm_jax.experiment.inputs import load_again
from ddpm_jax.experiment.recorded import Recorded, load_state
from ddpm_jax.experiment.train import train_alone
from ddpm_jax.experiment.types import Options, checked_task
from ddpm_jax.parallel import processes, sharding
from ddpm_jax.progress import print_result
from ddpm_jax.system.files import check_writable
from ddpm_jax.system.record import Record
from ddpm_jax.task import Evaluation, Variables
from ddpm_jax.training import evaluation
from ddpm_jax.training.records import check_entries, check_same, write_json
from ddpm_jax.training.step import evaluated_params


def evaluate(run: Recorded, options: Options) -> dict[str, float]:
    """Evaluate the newest checkpoint on all of a split, and write eval.json and images.

    Args:
      run: Run as its directory records it, with the config that the evaluation uses.
      options: Options of the command line.

    Returns:
      The metrics by name. The dict is empty if the evaluation had to train a feature network and
      the user stopped that training.

    Raises:
      UserError: If the run has no validation split and `options.split` is "validation", or the
        data set of the run is not available.
    """
    workdir, config, record = run.workdir, run.run_config, run.record
    if options.split == "validation" and config.data.validation == 0:
        raise UserError(
            f"--split=validation: the run in {workdir} was trained on all of the training images "
            "(--config.data.validation=0); give --split=test"
        )

    def check() -> None:
        check_entries(workdir)
        for folder in (workdir / "images", workdir):
            check_writable(folder, "--mode=eval")

    processes.from_main(check)
    config, state = load_state(workdir, config, options.parallel)
    name = config.data.name
    moved = name if name != get_recorded(record, "data", "name") else None
    data = load_again(record, options, config.data.validation, moved)
    check_same(workdir, record, {**record, "data": data.describe()})
    loaded = Loaded(data, data_dir=options.data_dir or record.get("data_dir"))
    options = options._replace(debug=record.get("debug", False))
    config = resources.prepare(config, loaded)
    run_resources = resources.load(config, loaded, options, train_alone)
    if run_resources is None:
        return {}
    task, data = checked_task(config), config.task.prepare_data(data)
    context = evaluation.EvaluationContext(
        task,
        Variables(evaluated_params(state, config), state.extra),
        data,
        split=options.split,
        seed=record["seed"],
        full=True,
        partitioner=sharding.make(options.parallel),
        resources=run_resources,
    )
    result = evaluation.evaluate(context)
    step = int(state.step)
    eval_record = {
        "step": step,
        "data": data.title,
        "split": options.split,
        "about": evaluation.describe_evaluation(result, config),
        "metrics": result.metrics,
    }
    processes.from_main(lambda: _write_evaluation(workdir, result, eval_record))
    title = f"{run.title} on {data.title}, checkpoint of step {step}"
    print_result(plots.table(plots.metric_rows(result.metrics), title))
    print_result(f"  images in {workdir / 'images'}, metrics in {workdir / 'eval.json'}")
    return result.metrics


def get_recorded(record: Record, section: str, field: str) -> object:
    """Return a field of the config in a run's record; return None if the record lacks the field."""
    values = record["config"].get(section)
    return values.get(field) if isinstance(values, dict) else None


def _write_evaluation(workdir: pathlib.Path, evaluation: Evaluation, eval_record: Record) -> None:
    """Write the images of an evaluation, and `eval_record` as eval.json, to a run directory."""
    check_entries(workdir)
    for name, image in evaluation.images.items():
        if isinstance(image, errors.NonFinite):
            raise RunError(f"the image {name} is not written: {image}")
        try:
            plots.save_image(workdir / "images" / name, image)
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    write_json(workdir / "eval.json", eval_record)
