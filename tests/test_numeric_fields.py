"""Every numeric field of every experiment with numbers that are out of range or extreme.

The command ends with an error of one line, or reaches the start of training, which is replaced.
"""

import subprocess
import sys
import time
import types
import typing

import pytest

from ddpm_jax.config import (
    SET_BY_PROGRAM,
    alternatives_of,
    choice_name,
    fields_of,
    override,
    sections_of,
)  # fmt: skip
from ddpm_jax.errors import RunError
from ddpm_jax.experiment.registry import load_experiment, names
from ddpm_jax.fields import bare_type
from ddpm_jax.training import loop as train
from helpers.launching import ROOT, user_environment

VALUES = ("1e12", "1e30", str(2**63), "1e308", "1e-320", "-1", "nan")
FEW = ("1e30", "1e-320", "-1")  # too large, too small and negative
EXPERIMENTS = names()
FAST = (  # one experiment of each type of task
    "vae_digits", "classifier_digits", "ddpm_digits", "vdm_digits", "text_encoder_shapes",
    "autoencoder_shapes",
)  # fmt: skip
SECONDS = 30.0  # limit of one command on a busy machine; most take a few milliseconds
STARTED = "the training starts here"


def takes_a_number(hint):
    """Return whether a field with this annotation is a number or a tuple of numbers."""
    bare = bare_type(hint)
    if typing.get_origin(bare) in (tuple, typing.Union, types.UnionType):
        return any(takes_a_number(inner) for inner in typing.get_args(bare))
    return bare in (int, float)


def numeric_fields(config):
    """Return the paths of the fields that are numbers or tuples of numbers."""
    fields = [field for field in fields_of(config) if not SET_BY_PROGRAM & field.marks]
    return [field.path for field in fields if takes_a_number(field.hint)]


def settings(name):
    """Return (flags, path) of every numeric field of an experiment.

    The flags choose the alternative of a section that has the field. For fields of the config
    itself there are no flags.
    """
    experiment = load_experiment(name)
    known = numeric_fields(experiment.config)
    numeric = [((), path) for path in known]
    for section, value, hint in sections_of(experiment.config):
        for cls in alternatives_of(hint):
            choice = choice_name(cls)
            if choice == choice_name(value):
                continue
            other = override(experiment.config, {section: choice}, {}, experiment.alternatives)
            more = [path for path in numeric_fields(other) if path not in known]
            numeric += [((f"--config.{section}={choice}",), path) for path in more]
            known += more
    return numeric


def data_of(name):
    """Return flags that replace the data set of an experiment by one without a download."""
    config = load_experiment(name).config
    data = config.data.name
    if data.partition(":")[0] in ("digits", "shapes"):
        return []
    path = "data" if "data.name" in {field.path for field in fields_of(config)} else "base.data"
    return [f"--config.{path}=digits:{32 if 'cifar' in name else 28}"]


@pytest.fixture
def training_is_replaced(monkeypatch):
    """Replace training by an error."""

    def fit(*_, **__):
        raise RunError(STARTED)

    monkeypatch.setattr(train, "fit", fit)


def sweep(run, name, *flags, values=VALUES):
    """Return the fields and values that end in neither an error of one line nor training."""
    wrong, tried = [], []
    swept = settings(name)
    assert len(swept) > 5
    for choice, path in swept:
        for value in values:
            field = " ".join([*choice, path])
            tried.append(field)
            start = time.monotonic()
            try:
                workdir = f"--workdir={len(tried)}"  # a new directory
                arguments = [*flags, *choice, f"--config.{path}={value}", workdir]
                result = run(f"--experiment={name}", *arguments)
            except Exception as error:
                wrong.append(f"{field}={value}: {type(error).__name__}: {error}"[:300])
                continue
            seconds = time.monotonic() - start
            lines = result.stderr.splitlines()
            refused = result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
            refused = refused and "unknown field" not in lines[0]
            started = result.returncode == 1 and lines[-1] == f"stopped: {STARTED}"
            if not (refused or started) or seconds > SECONDS:
                wrong.append(f"{field}={value}: {seconds:.1f} s: {lines[-1:]}")
    return wrong


@pytest.mark.parametrize("name", FAST)
def test_no_number_ends_in_a_traceback(launch_here, training_is_replaced, name):
    assert not sweep(launch_here, name, "--debug", *data_of(name), values=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("debug", [["--debug"], []], ids=["debug", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_number_ends_in_a_traceback_in_any_experiment(
    launch_here, training_is_replaced, name, debug
):
    assert not sweep(launch_here, name, *debug, *data_of(name))


@pytest.mark.slow
def test_no_number_ends_in_a_traceback_of_a_generation_model(
    launch_here, training_is_replaced, tmp_path
):
    parts = {}
    for part in ("text_encoder", "autoencoder"):
        parts[part] = tmp_path / part
        command = [f"--experiment={part}_shapes", "--debug", f"--workdir={tmp_path / part}"]
        subprocess.run(
            [sys.executable, ROOT / "launch.py", *command], env=user_environment(), check=True,
            capture_output=True, timeout=240,
        )  # fmt: skip
    flags = [f"--config.task.{name}={directory}" for name, directory in parts.items()]
    result = launch_here("--experiment=generator_shapes", "--debug", *flags)
    assert STARTED in result.stderr, result.stderr
    assert result.returncode == 1
    assert not sweep(launch_here, "generator_shapes", "--debug", *flags)
