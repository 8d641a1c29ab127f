"""Train, evaluate or sample one experiment: python launch.py --experiment=vae_mnist"""

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

if TYPE_CHECKING:  # they import jax
    from ddpm_jax.experiment.recorded import Recorded
    from ddpm_jax.experiment.types import Options

Cluster = tuple[str | None, int | None, int | None]  # coordinator, processes, which this is


def default_workdir(name: str) -> pathlib.Path:
    """Return where the run of an experiment lies unless --workdir says so."""
    return pathlib.Path("runs") / (f"{name}-debug" if FLAGS.debug else name)


def find_run() -> "Recorded":
    """Return what is recorded of the run that --workdir and --experiment name.

    Raises:
      UserError: there is none, or it is of another experiment.
    """
    from ddpm_jax.experiment.recorded import read_model

    name = FLAGS.experiment
    if name is None and FLAGS.workdir is None:
        raise UserError(f"--mode={FLAGS.mode} needs --workdir=DIR or --experiment=NAME")
    workdir = pathlib.Path(FLAGS.workdir).expanduser() if FLAGS.workdir else default_workdir(name)
    return read_model(workdir, name)


def changed(run: "Recorded", overrides: dict[str, str]) -> "Recorded":
    """Return a run with the fields of its config that may change as the command line says.

    Raises:
      UserError: a field is what the run was trained with.
    """
    from ddpm_jax.config import marked, override
    from ddpm_jax.experiment.effects import check_effects
    from ddpm_jax.experiment.guidance_models import check_guidance_model_is_another
    from ddpm_jax.experiment.recorded import info_from
    from ddpm_jax.experiment.types import Config, bind
    from ddpm_jax.fields import MAY_CHANGE

    config = override(run.config, overrides, None, run.experiment.alternatives)
    allowed = marked(run.config, MAY_CHANGE)
    if FLAGS.mode == "eval":
        allowed |= {"data", "data.name"}  # the same data may lie elsewhere today
    fixed = set(overrides) - allowed
    if fixed:
        raise UserError(
            f"--config.{min(fixed)} is what the run in {run.workdir} was trained with; only "
            f"lengths, intervals and the like can change: {', '.join(sorted(allowed))}"
        )
    assert isinstance(config, Config)  # a run is of one model
    config = bind(config, info_from(run.record))
    check_effects(config, overrides)
    check_guidance_model_is_another(config, run.workdir)
    return run._replace(config=config)


def train(overrides: dict[str, str], options: "Options", cluster: Cluster | None) -> None:
    """Train the experiment that the command line names."""
    from ddpm_jax.config import override
    from ddpm_jax.config_records import restore
    from ddpm_jax.experiment import inputs, preflight, run
    from ddpm_jax.experiment.effects import check_sweep, named_by_user
    from ddpm_jax.training import metric_writers

    name = FLAGS.experiment
    if name is None:
        raise UserError(f"--experiment=NAME is missing; there are: {', '.join(EXPERIMENTS)}")
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
        raise named_by_user(error, overrides) from None


def sample(run: "Recorded", options: "Options") -> None:
    """Sample images of a trained run into a file."""
    from ddpm_jax.experiment import sample, sizes
    from ddpm_jax.experiment.load import load_recorded
    from ddpm_jax.experiment.requests import Request
    from ddpm_jax.experiment.types import Config

    request = Request(*(FLAGS[flag].value for flag in SAMPLE_FLAGS))
    out = pathlib.Path(FLAGS.out).expanduser() if FLAGS.out else None
    prompts = prompts_of(FLAGS.prompt_file) if FLAGS.prompt_file is not None else ()
    count = FLAGS.num_samples * max(1, len(prompts))
    assert isinstance(run.config, Config)  # a run is of one model
    sizes.check_images(count, run.config.task.info.shape, "--num_samples", FLAGS.num_samples)
    trained = functools.partial(load_recorded, run, options.parallel)
    sample.sample(
        trained, run.workdir, options, request, FLAGS.num_samples, out, prompts, FLAGS.overwrite
    )


def main(arguments: list[str]) -> None:
    """Do what the command line says."""
    define_flags()
    os.environ["MPLBACKEND"] = "agg"  # images go to files; another value may not exist
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(arguments):
        terminal.show(help_text(arguments, __doc__ or ""))
        return
    overrides = parse(arguments)
    check_modes()
    import_jax()
    run = None if FLAGS.mode == "train" else changed(find_run(), overrides)
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
    """Run `main` and return the exit code; a mistake or a fault is one line on stderr."""
    try:
        main(arguments)
    except UserError as error:
        kind, message, code = "error", str(error), 2
    except RunError as error:
        kind, message, code = "stopped", str(error), 1
    except KeyboardInterrupt:
        kind, message, code = "interrupted", "by Ctrl-C", 130
    except Exception as error:
        if not _lost(error):
            raise
        reason = str(error).splitlines()[0][:200]
        kind, code = "stopped", 1
        message = (
            f"another process of this run is gone ({reason}); start all of them again, and the run "
            "goes on from its newest checkpoint"
        )
    else:
        reason = terminal.failure()
        if not reason:
            return 0
        kind, code = "stopped", 1
        message = f"cannot write to standard output: {reason}; what was written to files is whole"
    terminal.print_error(f"{kind}: {' '.join(message.split())}")
    return code


def _lost(error: Exception) -> bool:
    """Return whether this is how jax reports that another process is gone."""
    out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
    several = FLAGS["distributed"].value and not out_of_memory
    return bool(several) and type(error).__name__ == "JaxRuntimeError"


def _leave(code: int) -> None:
    """End the process with an exit code; one of several must not wait for the others."""
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
    with interrupts.ending_at_once():
        code = report(sys.argv[1:])
    _leave(code)
