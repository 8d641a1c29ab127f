"""Train, evaluate or sample an experiment: python launch.py --experiment=NAME [--mode=MODE]."""

import functools
import os
import pathlib
import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("ddpm_jax needs Python 3.11 or newer")

from ddpm_jax.errors import ConfigError, RunError, UserError
from ddpm_jax.experiment import registry
from ddpm_jax.experiment.command_line import (
    EXPERIMENTS,
    FLAGS,
    SAMPLE_FLAGS,
    check_modes,
    define_flags,
    help_text,
    parse,
    prompts_of,
)
from ddpm_jax.system import interrupts, terminal
from ddpm_jax.system.environment import import_jax

if TYPE_CHECKING:  # these modules import jax
    from ddpm_jax.experiment.recorded import Recorded
    from ddpm_jax.experiment.types import Options

# The coordinator's HOST:PORT, the number of processes, and the index of this process.
Cluster = tuple[str | None, int | None, int | None]


def default_workdir(name: str) -> pathlib.Path:
    """Return the run directory if --workdir is not given: runs/NAME, or runs/NAME-debug."""
    return pathlib.Path("runs") / (f"{name}-debug" if FLAGS.debug else name)


def find_run() -> "Recorded":
    """Return the trained run in --workdir or, without this flag, in the default directory.

    Raises:
      UserError: If the directory holds no run or a run of another experiment, or if neither
        --workdir nor --experiment is given.
    """
    from ddpm_jax.experiment.recorded import read_model

    name = FLAGS.experiment
    if name is None and FLAGS.workdir is None:
        raise UserError(f"--mode={FLAGS.mode} needs --workdir=DIR or --experiment=NAME")
    workdir = pathlib.Path(FLAGS.workdir).expanduser() if FLAGS.workdir else default_workdir(name)
    return read_model(workdir, name)


def apply_overrides(run: "Recorded", overrides: dict[str, str]) -> "Recorded":
    """Return a trained run with the overrides of the command line applied to its config.

    Args:
      run: Run as its directory records it.
      overrides: Values as text by the paths of their fields, such as {"train.steps": "100"}.

    Raises:
      UserError: If a field must not change after training, or has no effect.
    """
    from ddpm_jax.config import marked_paths, override
    from ddpm_jax.experiment.effects import check_effects
    from ddpm_jax.experiment.guidance_models import check_not_guided_by_itself
    from ddpm_jax.experiment.recorded import info_from
    from ddpm_jax.experiment.types import Config, bind
    from ddpm_jax.fields import MAY_CHANGE

    config = override(run.config, overrides, None, run.experiment.alternatives)
    allowed = marked_paths(run.config, MAY_CHANGE)
    if FLAGS.mode == "eval":
        allowed |= {"data", "data.name"}  # the data set may have been moved since the training
    refused = set(overrides) - allowed
    if refused:
        raise UserError(
            f"--config.{min(refused)} cannot change after the run in {run.workdir} was trained; "
            f"leave it out. Fields that can change: {', '.join(sorted(allowed))}"
        )
    assert isinstance(config, Config)  # `read_model` returns a single run
    config = bind(config, info_from(run.record))
    check_effects(config, overrides)
    check_not_guided_by_itself(config, run.workdir)
    return run._replace(config=config)


def train(overrides: dict[str, str], options: "Options", cluster: Cluster | None) -> None:
    """Train the experiment that --experiment names.

    Args:
      overrides: Values as text by the paths of their fields, such as {"train.steps": "100"}.
      options: Options of the command line that are not fields of the config.
      cluster: Address and size of the cluster; None if the run has one process.
    """
    from ddpm_jax.config import override
    from ddpm_jax.config_records import restore
    from ddpm_jax.experiment import inputs, preflight, run
    from ddpm_jax.experiment.effects import check_sweep, start_with_user_field
    from ddpm_jax.training import metric_writers

    name = FLAGS.experiment
    if name is None:
        raise UserError(f"--experiment=NAME is missing; give one of {', '.join(EXPERIMENTS)}")
    workdir = pathlib.Path(FLAGS.workdir).expanduser() if FLAGS.workdir else default_workdir(name)
    experiment = registry.load_experiment(name)
    earlier = preflight.read_run(workdir, complete=True)
    if earlier is not None and earlier["experiment"] == name and not earlier.get("part"):
        restore(experiment.config, earlier["config"], workdir)
    debug = experiment.debug if FLAGS.debug else {}
    config = override(experiment.config, overrides, debug, experiment.alternatives)
    check_sweep(config, overrides)
    if FLAGS.wandb:
        metric_writers.check_wandb()
    inputs.set_up_jax(FLAGS.debug, cluster, FLAGS.deterministic)
    try:
        run.train(experiment, config, workdir, options)
    except ConfigError as error:
        raise start_with_user_field(error, overrides) from None


def sample(run: "Recorded", options: "Options") -> None:
    """Sample --num_samples images (per prompt) of a trained run and write them to a file."""
    from ddpm_jax.experiment import sample, sizes
    from ddpm_jax.experiment.load import load_recorded
    from ddpm_jax.experiment.requests import Request
    from ddpm_jax.experiment.types import Config

    request = Request(*(FLAGS[flag].value for flag in SAMPLE_FLAGS))
    out = pathlib.Path(FLAGS.out).expanduser() if FLAGS.out else None
    prompts = prompts_of(FLAGS.prompt_file) if FLAGS.prompt_file is not None else ()
    count = FLAGS.num_samples * max(1, len(prompts))
    assert isinstance(run.config, Config)  # `read_model` returns a single run
    sizes.check_images(count, run.config.task.info.shape, "--num_samples", FLAGS.num_samples)
    trained = functools.partial(load_recorded, run, options.parallel)
    sample.sample(
        trained, run.workdir, options, request, FLAGS.num_samples, out, prompts, FLAGS.overwrite
    )


def main(arguments: list[str]) -> None:
    """Read the flags; then train, evaluate or sample."""
    define_flags()
    os.environ["MPLBACKEND"] = "agg"  # figures are written to files, so no display is needed
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(arguments):
        terminal.show(help_text(arguments, __doc__ or ""))
        return
    overrides = parse(arguments)
    check_modes()
    import_jax()
    run = None if FLAGS.mode == "train" else apply_overrides(find_run(), overrides)
    from ddpm_jax.experiment import evaluate, inputs
    from ddpm_jax.experiment.types import Options
    from ddpm_jax.parallel import cluster as clusters

    cluster: Cluster | None = None
    if FLAGS.distributed:
        cluster = (FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        clusters.check_cluster(*cluster)
    options = Options(
        FLAGS.seed,
        FLAGS.parallel,
        FLAGS.data_dir,
        FLAGS.strict_data,
        FLAGS.debug,
        FLAGS.profile,
        FLAGS.wandb,
        FLAGS.split,
        frozenset(overrides),
    )
    if run is None:
        train(overrides, options, cluster)
        return
    inputs.set_up_jax(cluster=cluster, deterministic=FLAGS.deterministic)
    if FLAGS.mode == "sample":
        sample(run, options)
    else:
        evaluate.evaluate(run, options)


def report(arguments: list[str]) -> int:
    """Run `main` and return the exit code of the process; write an error to stderr as one line.

    The exit code is 0 for success, 1 if the run was stopped, 2 for a user's mistake, and 130 for
    Ctrl-C.
    """
    try:
        main(arguments)
    except UserError as error:
        prefix, message, code = "error", str(error), 2
    except RunError as error:
        prefix, message, code = "stopped", str(error), 1
    except KeyboardInterrupt:
        prefix, message, code = "interrupted", "by Ctrl-C", 130
    except Exception as error:
        if not _is_lost_process(error):
            raise
        reason = str(error).splitlines()[0][:200]
        prefix, code = "stopped", 1
        message = (
            f"another process of this run ended ({reason}); start all processes again, and the run "
            "resumes from its newest checkpoint"
        )
    else:
        reason = terminal.failure()
        if not reason:
            return 0
        prefix, code = "stopped", 1
        message = f"cannot write to standard output: {reason}; all files were written completely"
    terminal.print_error(f"{prefix}: {' '.join(message.split())}")
    return code


def _is_lost_process(error: Exception) -> bool:
    """Return True if jax raised the error because another process of the run ended."""
    out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
    distributed = FLAGS["distributed"].value and not out_of_memory
    return bool(distributed) and type(error).__name__ == "JaxRuntimeError"


def _leave(code: int) -> None:
    """End the process; after an error, do not wait until the other processes of the run end."""
    terminal.flush()
    distributed = code != 0 and FLAGS["distributed"].value
    if distributed:
        from ddpm_jax.parallel.cluster import leave, meet_before_leaving

        if code != 130:
            meet_before_leaving()
        leave()
    os._exit(code) if distributed or code == 130 else sys.exit(code)


if __name__ == "__main__":
    terminal.prepare()
    with interrupts.end_on_ctrl_c():
        code = report(sys.argv[1:])
    _leave(code)
