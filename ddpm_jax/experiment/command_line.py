"""The command line: flags, overrides of a config, help, and what a wrong word may mean."""

import ast
import os
import pathlib
import typing

from absl import flags

from ddpm_jax.config import (
    SET_BY_PROGRAM,
    Setting,
    alternatives_of,
    choice_name,
    expanded,
    fields_of,
    has_choice,
    paths_named,
    sections_of,
)
from ddpm_jax.errors import UserError, nearest
from ddpm_jax.experiment import registry
from ddpm_jax.fields import LARGEST_FLOAT, LARGEST_INT, bare_type, type_name
from ddpm_jax.parallel import PARALLEL
from ddpm_jax.system.environment import import_jax

EXPERIMENTS = registry.names()
FLAGS = flags.FlagValues()  # type: ignore[no-untyped-call]
# The fields of a Request.
SAMPLE_FLAGS = ("label", "sampler", "steps", "guidance", "prompt", "negative_prompt")


def define_flags() -> None:
    """Define all flags but --config.FIELD, which follow from the experiment."""
    for name in list(FLAGS):  # of an earlier call in this process
        delattr(FLAGS, name)
    _define_run_flags()
    _define_process_flags()
    _define_data_flags()
    _define_sample_flags()


def _define_run_flags() -> None:
    _enum("experiment", None, EXPERIMENTS, "A file of experiments/.")
    modes = ["train", "eval", "sample"]
    _enum("mode", "train", modes, "eval and sample read the run's newest checkpoint.")
    _string("workdir", "Default: runs/EXPERIMENT; resumed if there.")
    _bool("debug", "A tiny variant that ends in seconds.")
    _enum("parallel", "jit", PARALLEL, "How a step is spread over devices.")
    _bool("deterministic", "Resume to the bit on a GPU, too; slower.")
    _bool("profile", "Trace steps 10 to 15 into WORKDIR/profile.")
    _bool("wandb", "Follow the run on Weights & Biases, too.")


def _define_process_flags() -> None:
    _bool("distributed", "One of several processes (docs/clusters.md).")
    _string("coordinator", "HOST:PORT of process 0, outside of clusters.")
    _integer("num_processes", None, "How many there are.", 1, None)
    _integer("process_id", None, "Which this is, from 0 on.", 0, None)


def _define_data_flags() -> None:
    _string("data_dir", "Where TFDS data sets are or get prepared.")
    _bool("strict_data", "A missing data set is an error.")
    _integer("seed", 0, "Of all that is drawn.", 0, 2**32 - 1)
    use = "eval: make choices on validation images, final figures of test images."
    _enum("split", "test", ["validation", "test"], use)


def _define_sample_flags() -> None:
    _integer("num_samples", 64, "sample: how many images.", 1, LARGEST_INT)
    _string("out", "sample: a .png or .npz; written as it goes.")
    _bool("overwrite", "sample: replace a file of somebody else's.")
    _integer("label", None, "sample: the class to draw.", 0, LARGEST_INT)
    _string("sampler", "sample: which sampler.")
    _integer("steps", None, "sample: how many steps.", 1, 1_000_000)
    scale = "sample: scale of guidance; 1: none (a classifier's: 0)."
    flags.DEFINE_float("guidance", None, scale, flag_values=FLAGS)
    _string("prompt", "sample: the text to draw.")
    _string("negative_prompt", "sample: what guidance leads away from.")
    _string("prompt_file", "sample: a file of prompts, a line each.")


def _enum(name: str, default: str | None, values: list[str], text: str) -> None:
    flags.DEFINE_enum(name, default, values, text, flag_values=FLAGS)


def _string(name: str, text: str) -> None:
    flags.DEFINE_string(name, None, text, flag_values=FLAGS)


def _bool(name: str, text: str) -> None:
    flags.DEFINE_bool(name, False, text, flag_values=FLAGS)


def _integer(name: str, default: int | None, text: str, low: int, high: int | None) -> None:
    """Define a flag of a whole number.

    Args:
      name: of the flag.
      default: without the flag.
      text: of the help.
      low: the least value.
      high: the largest value; None: there is none.
    """
    flags.DEFINE_integer(name, default, text, low, high, flag_values=FLAGS)


def parse(arguments: list[str]) -> dict[str, str]:
    """Fill FLAGS and return the config's overrides {field: text}.

    Raises:
      UserError: an unknown flag, a value that is none, or a stray word.
    """
    overrides: dict[str, str] = {}
    others: list[str] = []
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
        raise UserError(f'"{stray[0]}" is not a flag: flags are written --NAME=VALUE')
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


def _explain(flag: flags.Flag[Setting], message: str) -> str:
    value, reason = message.split("=", 1)[1].split(": ", 1)
    if isinstance(flag, flags.EnumFlag):
        return f'--{flag.name}: there is no "{value}"{nearest(value, flag.parser.enum_values)}'
    if reason.startswith(("invalid literal", "could not convert", "('Non-boolean")):
        allowed = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        reason = f"must be {allowed[flag.flag_type()]}"
    return f"--{flag.name}={value}: {reason}"


def help_text(arguments: list[str], title: str) -> str:
    """Return the flags, the experiments and, with --experiment, its config's fields."""
    lines = [title, "", "flags:"]
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
        tree = ast.parse((registry.ROOT / "experiments" / f"{name}.py").read_text("utf-8"))
        lines.append(f"  {name:<22}{(ast.get_docstring(tree) or '').splitlines()[0]}")
    chosen = [word.partition("=")[2] for word in arguments if word.startswith("--experiment=")]
    if chosen and chosen[-1] in EXPERIMENTS:
        import_jax()
        lines += ["", f"fields of {chosen[-1]}:"]
        for name, kind, default, text in describe(registry.load_experiment(chosen[-1]).config):
            lines.append(f"  --config.{name + '=' + kind:<46} {default:<12} {text}".rstrip())
    else:
        lines += ["", "python launch.py --experiment=NAME --help lists its config's fields."]
    return "\n".join(lines)


def describe(config: Setting) -> list[tuple[str, str, str, str]]:
    """Return (path, type, default, help) of everything that can be set, for `--help`."""
    rows: list[tuple[str, str, str, str]] = []
    choices = {p: (value, hint) for p, value, hint in sections_of(config) if has_choice(hint)}
    for path, (value, hint) in choices.items():
        names = "|".join(map(choice_name, alternatives_of(hint)))
        if type(None) in typing.get_args(bare_type(hint)):
            names += "|none"
        rows.append((path, names, choice_name(value), ""))
    for field in fields_of(config):
        if not SET_BY_PROGRAM & field.marks:
            rows.append((field.path, type_name(field.hint), as_typed(field.value), field.help))
    return rows


def as_typed(value: object) -> str:
    """Return a field's value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)


def prompts_of(file: str) -> tuple[str, ...]:
    """Return the lines of a file of prompts that are not empty.

    Raises:
      UserError: it cannot be read, there are none, or there is --prompt, too.
    """
    if FLAGS.prompt is not None:
        raise UserError("--prompt and --prompt_file: give one of them")
    from ddpm_jax.data.captions import lines_of, read_text

    try:
        lines = lines_of(read_text(pathlib.Path(os.path.expanduser(file))))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text in UTF-8"
        raise UserError(f"--prompt_file={file} cannot be read: {reason}") from None
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--prompt_file={file} holds no prompts; write one a line")
    return prompts


def check_modes() -> None:
    """Check that every flag that is given has an effect in this mode.

    Raises:
      UserError: a flag has none.
    """
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
