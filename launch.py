"""Train, evaluate or sample one experiment: python launch.py --experiment=vae_mnist"""

import ast
import functools
import os
import pathlib
import sys
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("ddpm_jax needs Python 3.11 or newer")

from absl import flags

from ddpm_jax.config import expanded
from ddpm_jax.errors import ConfigError, RunError, UserError, nearest
from ddpm_jax.experiment import registry
from ddpm_jax.fields import LARGEST_FLOAT, LARGEST_INT
from ddpm_jax.system import interrupts, terminal
from ddpm_jax.system.environment import import_jax

HERE = pathlib.Path(__file__).parent
EXPERIMENTS = registry.names()
FLAGS = flags.FlagValues()
# The fields of a Request.
SAMPLE_FLAGS = ("label", "sampler", "steps", "guidance", "prompt", "negative_prompt")


def define_flags() -> None:
    """All flags but --config.FIELD, which follow from the experiment."""
    for name in list(FLAGS):  # of an earlier call in this process
        delattr(FLAGS, name)

    def define(kind, name, default, text, *args, **kwargs):
        kind(name, default, *args, text, flag_values=FLAGS, **kwargs)

    define(flags.DEFINE_enum, "experiment", None, "A file of experiments/.", EXPERIMENTS)
    define(
        flags.DEFINE_enum,
        "mode",
        "train",
        "eval and sample read the run's newest checkpoint.",
        ["train", "eval", "sample"],
    )
    define(flags.DEFINE_string, "workdir", None, "Default: runs/EXPERIMENT; resumed if there.")
    define(flags.DEFINE_bool, "debug", False, "A tiny variant that ends in seconds.")
    define(
        flags.DEFINE_enum,
        "parallel",
        "jit",
        "How a step is spread over devices.",
        ["jit", "pmap", "fsdp"],
    )
    define(flags.DEFINE_bool, "deterministic", False, "Resume to the bit on a GPU, too; slower.")
    define(flags.DEFINE_bool, "profile", False, "Trace steps 10 to 15 into WORKDIR/profile.")
    define(flags.DEFINE_bool, "wandb", False, "Follow the run on Weights & Biases, too.")
    define(flags.DEFINE_bool, "distributed", False, "One of several processes (docs/clusters.md).")
    define(flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0, outside of clusters.")
    define(flags.DEFINE_integer, "num_processes", None, "How many there are.", lower_bound=1)
    define(flags.DEFINE_integer, "process_id", None, "Which this is, from 0 on.", lower_bound=0)
    define(flags.DEFINE_string, "data_dir", None, "Where TFDS data sets are or get prepared.")
    define(flags.DEFINE_bool, "strict_data", False, "A missing data set is an error.")
    define(
        flags.DEFINE_integer,
        "seed",
        0,
        "Of all that is drawn.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    define(
        flags.DEFINE_enum,
        "split",
        "test",
        "eval: make choices on validation images, final figures of test images.",
        ["validation", "test"],
    )
    count = dict(lower_bound=1, upper_bound=LARGEST_INT)
    define(flags.DEFINE_integer, "num_samples", 64, "sample: how many images.", **count)
    define(flags.DEFINE_string, "out", None, "sample: a .png or .npz; written as it goes.")
    define(flags.DEFINE_bool, "overwrite", False, "sample: replace a file of somebody else's.")
    define(
        flags.DEFINE_integer,
        "label",
        None,
        "sample: the class to draw.",
        **(count | {"lower_bound": 0}),
    )
    define(flags.DEFINE_string, "sampler", None, "sample: which sampler.")
    steps = dict(lower_bound=1, upper_bound=1_000_000)
    define(flags.DEFINE_integer, "steps", None, "sample: how many steps.", **steps)
    define(
        flags.DEFINE_float,
        "guidance",
        None,
        "sample: scale of guidance; 1: none (a classifier's: 0).",
    )
    define(flags.DEFINE_string, "prompt", None, "sample: the text to draw.")
    define(flags.DEFINE_string, "negative_prompt", None, "sample: what guidance leads away from.")
    define(flags.DEFINE_string, "prompt_file", None, "sample: a file of prompts, a line each.")


def parse(arguments: list[str]) -> dict[str, str]:
    """Fill FLAGS; returns the config's overrides {field: text}.

    Raises:
      UserError: an unknown flag, a value that is none, or a stray word.
    """
    overrides, others = {}, []
    words = iter(arguments)
    for word in words:
        if word.startswith(("--config.", "-config.")):
            name, equals, text = word.partition(".")[2].partition("=")
            if not equals:
                text = next(words, "--")
                if text.startswith("--"):
                    raise UserError(f"--config.{name} needs a value: --config.{name}=VALUE")
            overrides[name] = text
        elif word in ("--config", "-config") or word.startswith(("--config=", "-config=")):
            text = word.partition("=")[2] or next(words, "")
            raise UserError(f"--config is not a flag by itself; {config_flag(text, arguments)}")
        elif word.lstrip("-").partition("=")[0] == "undefok":
            raise UserError("--undefok: an unknown flag is always an error; leave it out")
        else:
            others.append(word)
    try:
        stray = FLAGS(["launch.py", *others])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [name for name in FLAGS if len(name) > 1]
        path = path_of(error.flagname, arguments)
        hint = f"; give --config.{path}=VALUE" if path else nearest(error.flagname, known)
        raise UserError(f'unknown flag "--{error.flagname}"{hint}') from None
    except flags.IllegalFlagValueError as error:
        flag = FLAGS[str(error).split("flag --")[1].split("=")[0]]
        raise UserError(_explain(flag, str(error))) from None
    except (flags.Error, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    for name in FLAGS:
        value = FLAGS[name].value
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise UserError(f"--{name}={value}: must be a finite number that float32 holds")
    for name in ("workdir", "out", "data_dir", "prompt_file"):
        place = FLAGS[name].value
        if place == "":
            raise UserError(f"--{name}= is empty: give a path")
        if place is not None:
            expanded(f"--{name}", place)
    if stray:
        raise UserError(f'"{stray[0]}" is no flag: flags are written --NAME=VALUE')
    return overrides


# What other programs call a field, and its path here.
CALLED = {
    "epochs": "train.steps",
    "num_epochs": "train.steps",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "iterations": "train.steps",
    "lr": "optimizer.learning_rate",
    "bs": "train.batch_size",
    "dataset": "data",
    "model": "task.network",
    "ema_decay": "ema.half_life_images",
}


def path_of(word: str, arguments: list[str]) -> str:
    """Return the path of the config field that a user means by one word; "": there is none."""
    import_jax()
    from ddpm_jax.config import paths_named

    chosen = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("experiment=")]
    name = chosen[-1] if chosen and chosen[-1] in EXPERIMENTS else "ddpm_digits"
    word = word.removeprefix("config.")
    same = paths_named(registry.load_experiment(name).config, CALLED.get(word, word))
    first = {"data": 0, "train": 0, "optimizer": 0, "ema": 1}  # sections that are meant most often
    rank = {path: (first.get(path.split(".")[0], 2), path.count(".")) for path in same}
    return min(same, key=lambda path: rank[path]) if same else ""


def config_flag(text: str, arguments: list[str]) -> str:
    """Return how `text`, such as steps=5, is written as a flag of the config."""
    name, _, value = text.partition("=")
    path = path_of(name, arguments) or "PATH"
    return f"give --config.{path}={value or 'VALUE'}"


def _explain(flag: flags.Flag, message: str) -> str:
    value, reason = message.split("=", 1)[1].split(": ", 1)
    if isinstance(flag, flags.EnumFlag):
        return f'--{flag.name}: there is no "{value}"{nearest(value, flag.parser.enum_values)}'
    if reason.startswith(("invalid literal", "could not convert", "('Non-boolean")):
        allowed = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        reason = f"must be {allowed[flag.flag_type()]}"
    return f"--{flag.name}={value}: {reason}"


def help_text(arguments: list[str]) -> str:
    """The flags, the experiments and, with --experiment, its config's fields."""
    lines = [__doc__ or "", "", "flags:"]
    for name in FLAGS:
        flag = FLAGS[name]
        choices = ""
        if isinstance(flag, flags.EnumFlag) and name != "experiment":
            choices = " " + "|".join(flag.parser.enum_values)
        default = "" if flag.default in (None, False) else f" (default {flag.default})"
        lines.append(f"  --{name:<17}{flag.help}{choices}{default}")
    lines += [
        "  --config.PATH=VALUE   Override a field of the config, such as --config.train.steps=100.",
        "  --config.SECTION=NAME Choose a section's alternative (--config.task.network=dit), or",
        "                        name the data set (--config.data=folder:PATH).",
        "",
    ]
    lines.append("experiments:")
    for name in EXPERIMENTS:
        tree = ast.parse((HERE / "experiments" / f"{name}.py").read_text("utf-8"))
        lines.append(f"  {name:<22}{(ast.get_docstring(tree) or '').splitlines()[0]}")
    chosen = [word.partition("=")[2] for word in arguments if word.startswith("--experiment=")]
    if chosen and chosen[-1] in EXPERIMENTS:
        import_jax()
        from ddpm_jax.config import describe

        lines += ["", f"fields of {chosen[-1]}:"]
        for name, kind, default, text in describe(registry.load_experiment(chosen[-1]).config):
            lines.append(f"  --config.{name + '=' + kind:<46} {default:<12} {text}".rstrip())
    else:
        lines += ["", "python launch.py --experiment=NAME --help lists its config's fields."]
    return "\n".join(lines)


def prompts_of(file: str) -> tuple[str, ...]:
    """The lines of a file of prompts that are not empty.

    Raises:
      UserError: it cannot be read, there are none, or there is --prompt, too.
    """
    if FLAGS.prompt is not None:
        raise UserError("--prompt and --prompt_file: give one of them")
    from ddpm_jax.data.captions import lines_of, read_text

    try:
        lines = lines_of(read_text(pathlib.Path(os.path.expanduser(file))))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"--prompt_file={file} cannot be read: {reason}") from None
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--prompt_file={file} holds no prompts; write one a line")
    return prompts


def check_modes() -> None:
    """Raises UserError if a flag has no effect in this mode."""
    for name in (*SAMPLE_FLAGS, "out", "overwrite", "num_samples", "prompt_file"):
        if FLAGS[name].present and FLAGS.mode != "sample":
            raise UserError(f"--{name} goes with --mode=sample")
    if FLAGS["split"].present and FLAGS.mode != "eval":
        raise UserError("--split goes with --mode=eval")
    if FLAGS["seed"].present and FLAGS.mode == "eval":
        raise UserError("--seed: an evaluation uses the seed of the run; leave it out")
    for name in ("profile", "wandb", "strict_data"):
        if FLAGS[name].value and FLAGS.mode != "train":
            raise UserError(f"--{name} goes with --mode=train")
    if FLAGS.data_dir and FLAGS.mode == "sample":
        raise UserError("--data_dir: sampling reads no data set; leave it out")
    given = [flag for flag in ("coordinator", "num_processes", "process_id") if FLAGS[flag].present]
    if given and not FLAGS.distributed:
        raise UserError(f"--{given[0]} goes with --distributed")


def default_workdir(name: str) -> pathlib.Path:
    """Where the run of an experiment lies unless --workdir says so."""
    return pathlib.Path("runs") / (name + "-debug" * FLAGS.debug)


def find_run() -> Any:
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


def changed(run: Any, overrides: dict[str, str]) -> Any:
    """Return a run with the fields of its config that may change as the command line says.

    Raises:
      UserError: a field is what the run was trained with.
    """
    from ddpm_jax.config import marked, override
    from ddpm_jax.experiment.effects import check_effects
    from ddpm_jax.experiment.guidance_models import check_guides_another
    from ddpm_jax.experiment.recorded import info_from
    from ddpm_jax.experiment.types import bind
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
    config = bind(config, info_from(run.record))
    check_effects(config, overrides)
    check_guides_another(config, run.workdir)
    return run._replace(config=config)


def train(overrides: dict[str, str], options: Any, cluster: Any) -> None:
    """Train the experiment that the command line names."""
    from ddpm_jax.config import override, restore
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


def sample(run: Any, options: Any) -> None:
    """Sample images of a trained run into a file."""
    from ddpm_jax.experiment import sample, sizes
    from ddpm_jax.experiment.load import load_recorded
    from ddpm_jax.task import Request

    request = Request(*(FLAGS[flag].value for flag in SAMPLE_FLAGS))
    out = pathlib.Path(FLAGS.out).expanduser() if FLAGS.out else None
    prompts = prompts_of(FLAGS.prompt_file) if FLAGS.prompt_file is not None else ()
    count = FLAGS.num_samples * max(1, len(prompts))
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
        terminal.show(help_text(arguments))
        return
    overrides = parse(arguments)
    check_modes()
    import_jax()
    run = None if FLAGS.mode == "train" else changed(find_run(), overrides)
    from ddpm_jax.experiment import evaluate, inputs
    from ddpm_jax.experiment.types import Options
    from ddpm_jax.parallel import cluster as clusters

    cluster = None
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
    """Whether this is how jax reports that another process is gone."""
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
