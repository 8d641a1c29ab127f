"""The command line: flags, overrides of config fields, help texts, and hints for wrong flags."""

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
    expand_path,
    fields_of,
    has_choice,
    paths_named,
    sections_of,
)
from ddpm_jax.errors import UserError, suggestion
from ddpm_jax.experiment import registry
from ddpm_jax.fields import LARGEST_FLOAT, LARGEST_INT, bare_type, type_name
from ddpm_jax.parallel import PARALLEL
from ddpm_jax.system.environment import import_jax

EXPERIMENTS = registry.names()
FLAGS = flags.FlagValues()  # type: ignore[no-untyped-call]
# The flags that are fields of a `Request`, in the order of its fields.
SAMPLE_FLAGS = ("label", "sampler", "steps", "guidance", "prompt", "negative_prompt")


def define_flags() -> None:
    """Define all flags except --config.PATH, which depend on the experiment."""
    for name in list(FLAGS):  # an earlier call in this process may have defined them
        delattr(FLAGS, name)
    _define_run_flags()
    _define_process_flags()
    _define_data_flags()
    _define_sample_flags()


def _define_run_flags() -> None:
    _enum("experiment", None, EXPERIMENTS, "Name of a file in experiments/, without .py.")
    modes = ["train", "eval", "sample"]
    text = "Train a run, or evaluate or sample its newest checkpoint."
    _enum("mode", "train", modes, text)
    text = "Directory of the run; an interrupted run resumes. Default: runs/EXPERIMENT."
    _string("workdir", text)
    _bool("debug", "Train a tiny variant of the experiment, which ends in seconds.")
    _enum("parallel", "jit", PARALLEL, "How a training step is partitioned across devices.")
    text = "Use deterministic GPU kernels, so that resuming is exact; slower."
    _bool("deterministic", text)
    _bool("profile", "Write a profiler trace of steps 10 to 15 to WORKDIR/profile.")
    _bool("wandb", "Also log the run to Weights & Biases.")


def _define_process_flags() -> None:
    _bool("distributed", "This process is one of several processes of a run (docs/clusters.md).")
    text = "Address HOST:PORT of process 0; needed only if jax does not detect it."
    _string("coordinator", text)
    _integer("num_processes", None, "Number of processes of the run.", 1, None)
    _integer("process_id", None, "Index of this process, starting at 0.", 0, None)


def _define_data_flags() -> None:
    _string("data_dir", "Directory of TFDS data sets; a missing data set is prepared there.")
    _bool("strict_data", "Fail if the data set is missing, instead of using the fallback.")
    _integer("seed", 0, "Seed of all random numbers.", 0, 2**32 - 1)
    text = "eval: split of the data. Choose settings on validation; report results on test."
    _enum("split", "test", ["validation", "test"], text)


def _define_sample_flags() -> None:
    _integer("num_samples", 64, "sample: number of images.", 1, LARGEST_INT)
    text = "sample: output file, .png or .npz. Default: WORKDIR/images/sampled.png."
    _string("out", text)
    text = "sample: replace the output file even if another program wrote it."
    _bool("overwrite", text)
    text = "sample: class of all images. Default: a random class for each image."
    _integer("label", None, text, 0, LARGEST_INT)
    _string("sampler", "sample: name of the sampler. Default: the run's setting.")
    text = "sample: number of sampling steps. Default: the run's setting."
    _integer("steps", None, text, 1, 1_000_000)
    text = "sample: guidance scale. 1 disables guidance; 0 disables classifier guidance."
    flags.DEFINE_float("guidance", None, text, flag_values=FLAGS)
    _string("prompt", "sample: text that the images show.")
    _string("negative_prompt", "sample: text that replaces the null conditioning of guidance.")
    _string("prompt_file", "sample: text file with one prompt per line.")


def _enum(name: str, default: str | None, values: list[str], text: str) -> None:
    flags.DEFINE_enum(name, default, values, text, flag_values=FLAGS)


def _string(name: str, text: str) -> None:
    flags.DEFINE_string(name, None, text, flag_values=FLAGS)


def _bool(name: str, text: str) -> None:
    flags.DEFINE_bool(name, False, text, flag_values=FLAGS)


def _integer(name: str, default: int | None, text: str, low: int, high: int | None) -> None:
    """Define a flag whose value is a whole number.

    Args:
      name: Name of the flag.
      default: Value if the flag is not given.
      text: Help text.
      low: Smallest allowed value.
      high: Largest allowed value; if None, there is no upper limit.
    """
    flags.DEFINE_integer(name, default, text, low, high, flag_values=FLAGS)


def parse(arguments: list[str]) -> dict[str, str]:
    """Set FLAGS and return the overrides of config fields, such as {"train.steps": "100"}.

    Raises:
      UserError: If a flag is unknown, a value is invalid, or an argument is not a flag.
    """
    overrides: dict[str, str] = {}
    other_words: list[str] = []
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
            raise UserError("--undefok: an unknown flag is always an error; leave --undefok out")
        else:
            other_words.append(word)
    try:
        not_flags = FLAGS(["launch.py", *other_words])[1:]
    except flags.UnrecognizedFlagError as error:
        names = [name for name in FLAGS if len(name) > 1]
        path = path_of(error.flagname, arguments)
        hint = f"; give --config.{path}=VALUE" if path else suggestion(error.flagname, names)
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
        value = FLAGS[name].value
        if value == "":
            raise UserError(f"--{name}= is empty: give a path")
        if value is not None:
            expand_path(f"--{name}", value)
    if not_flags:
        raise UserError(f'"{not_flags[0]}" is not a flag: flags are written --NAME=VALUE')
    return overrides


# Names that other programs use for a field, and the field's path in this project.
SYNONYMS = {
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
    """Return the path of the config field that `word` may mean; return "" if no field matches."""
    import_jax()
    chosen = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith("experiment=")]
    name = chosen[-1] if chosen and chosen[-1] in EXPERIMENTS else "ddpm_digits"
    word = word.removeprefix("config.")
    paths = paths_named(registry.load_experiment(name).config, SYNONYMS.get(word, word))
    first = {
        "data": 0,
        "train": 0,
        "optimizer": 0,
        "ema": 1,
    }  # fields of these sections are the most likely ones
    rank = {path: (first.get(path.split(".")[0], 2), path.count(".")) for path in paths}
    return min(paths, key=lambda path: rank[path]) if paths else ""


def config_flag(text: str, arguments: list[str]) -> str:
    """Return how to write `text` as a flag: for "steps=5", "give --config.train.steps=5"."""
    name, _, value = text.partition("=")
    path = path_of(name, arguments) or "PATH"
    return f"give --config.{path}={value or 'VALUE'}"


def _explain(flag: flags.Flag[Setting], message: str) -> str:
    value, reason = message.split("=", 1)[1].split(": ", 1)
    if isinstance(flag, flags.EnumFlag):
        return f'--{flag.name}: there is no "{value}"{suggestion(value, flag.parser.enum_values)}'
    if reason.startswith(("invalid literal", "could not convert", "('Non-boolean")):
        allowed = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        reason = f"must be {allowed[flag.flag_type()]}"
    return f"--{flag.name}={value}: {reason}"


def help_text(arguments: list[str], title: str) -> str:
    """Return the text of --help: flags, experiments and, with --experiment, its config fields."""
    lines = [title, "", "flags:"]
    for name in FLAGS:
        flag = FLAGS[name]
        text, notes = flag.help, []
        if isinstance(flag, flags.EnumFlag):
            text = text.partition(">: ")[2]  # absl puts <CHOICES>: before the text
            if name != "experiment":  # the experiments are listed below
                notes.append("|".join(flag.parser.enum_values))
        if flag.default not in (None, False):
            notes.append(f"default {flag.default}")
        lines.append(f"  --{name:<17}{text}" + f" ({'; '.join(notes)})" * bool(notes))
    lines += [
        "  --config.PATH=VALUE   Override a field of the config, such as --config.train.steps=100.",
        "  --config.SECTION=NAME Choose a section's alternative (--config.task.network=dit), or",
        "                        the data set (--config.data=folder:PATH).",
        "Flags that begin with eval: or sample: need --mode=eval or --mode=sample.",
        "",
    ]
    lines.append("experiments:")
    for name in EXPERIMENTS:
        tree = ast.parse((registry.ROOT / "experiments" / f"{name}.py").read_text("utf-8"))
        lines.append(f"  {name:<26}{(ast.get_docstring(tree) or '').splitlines()[0]}")
    chosen = [word.partition("=")[2] for word in arguments if word.startswith("--experiment=")]
    if chosen and chosen[-1] in EXPERIMENTS:
        import_jax()
        lines += ["", f"config fields of {chosen[-1]} (flag=type, default, meaning):"]
        for name, type_text, default, text in describe(registry.load_experiment(chosen[-1]).config):
            lines.append(f"  --config.{name + '=' + type_text:<46} {default:<12} {text}".rstrip())
    else:
        lines += ["", "python launch.py --experiment=NAME --help lists the config fields of NAME."]
    return "\n".join(lines)


def describe(config: Setting) -> list[tuple[str, str, str, str]]:
    """Return a row (path, type, default, help) for every section and field that a user can set."""
    rows: list[tuple[str, str, str, str]] = []
    choices = {p: (value, hint) for p, value, hint in sections_of(config) if has_choice(hint)}
    for path, (value, hint) in choices.items():
        names = "|".join(map(choice_name, alternatives_of(hint)))
        if type(None) in typing.get_args(bare_type(hint)):
            names += "|none"
        rows.append(
            (path, names, choice_name(value), "Type of this section; it decides the fields.")
        )
    for field in fields_of(config):
        if not SET_BY_PROGRAM & field.marks:
            rows.append((field.path, type_name(field.hint), as_typed(field.value), field.help))
    return rows


def as_typed(value: object) -> str:
    """Return the text of a field's value for the command line, such as "1,2" for (1, 2)."""
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and value == float(f"{value:g}") else str(value)


def prompts_of(file: str) -> tuple[str, ...]:
    """Return the prompts of a text file: its lines that are not empty.

    Raises:
      UserError: If the file cannot be read or holds no prompt, or if --prompt is also given.
    """
    if FLAGS.prompt is not None:
        raise UserError("--prompt and --prompt_file cannot be combined; give one of them")
    from ddpm_jax.data.captions import lines_of, read_text

    try:
        lines = lines_of(read_text(pathlib.Path(os.path.expanduser(file))))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text in UTF-8"
        raise UserError(f"--prompt_file={file} cannot be read: {reason}") from None
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise UserError(f"--prompt_file={file} holds no prompts; write one prompt per line")
    return prompts


def check_modes() -> None:
    """Check that every given flag has an effect in the chosen mode.

    Raises:
      UserError: If a flag has no effect in this mode.
    """

    def refuse(name: str, needed: str) -> None:
        raise UserError(
            f"--{name} has no effect without {needed}; leave --{name} out, or add {needed}"
        )

    for name in (*SAMPLE_FLAGS, "out", "overwrite", "num_samples", "prompt_file"):
        if FLAGS[name].present and FLAGS.mode != "sample":
            refuse(name, "--mode=sample")
    if FLAGS["split"].present and FLAGS.mode != "eval":
        refuse("split", "--mode=eval")
    if FLAGS["seed"].present and FLAGS.mode == "eval":
        raise UserError("--seed: an evaluation uses the seed of the run; leave --seed out")
    for name in ("profile", "wandb", "strict_data"):
        if FLAGS[name].value and FLAGS.mode != "train":
            refuse(name, "--mode=train")
    if FLAGS.data_dir and FLAGS.mode == "sample":
        raise UserError("--data_dir: sampling reads no data set; leave --data_dir out")
    given = [flag for flag in ("coordinator", "num_processes", "process_id") if FLAGS[flag].present]
    if given and not FLAGS.distributed:
        refuse(given[0], "--distributed")
