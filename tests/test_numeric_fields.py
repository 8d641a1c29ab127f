"""Every numeric field of every experiment with numbers that no run can use, or hardly any.

Each ends in one line of an error, or reaches the start of the training, which is replaced.
"""

import subprocess
import sys
import time
import types
import typing

import pytest

import launch
from ddpm_jax.config import hints_of as fields
from ddpm_jax.errors import RunError
from ddpm_jax.fields import FROM_DATA, FROM_PARTS
from ddpm_jax.training import loop as train
from helpers.launching import ROOT, user_environment

VALUES = ("1e12", "1e30", str(2**63), "1e308", "1e-320", "-1", "nan")
FEW = ("1e30", "1e-320", "-1")  # one of each kind
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
FAST = (  # one of each kind of task
    "vae_digits", "classifier_digits", "ddpm_digits", "vdm_digits", "text_encoder_shapes",
    "autoencoder_shapes",
)  # fmt: skip
SECONDS = 30.0  # in which each must end on a busy machine; most take a few milliseconds
STARTED = "the training starts here"


def numeric_fields(cls):
    """The fields that take a number, or several."""

    def takes_a_number(hint):
        if typing.get_origin(hint) is typing.Annotated:
            marks = {mark for mark in hint.__metadata__ if isinstance(mark, str)}
            return not marks & {FROM_DATA, FROM_PARTS} and takes_a_number(hint.__origin__)
        if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType):
            return any(takes_a_number(inner) for inner in typing.get_args(hint))
        return hint in (int, float)

    return [name for name, hint in fields(cls).items() if takes_a_number(hint)]


def data_of(name):
    """Data that are at hand in the place of those that are not."""
    own = launch.load_experiment(name).Config().data
    if own.partition(":")[0] in ("digits", "shapes"):
        return []
    return ["--config.data=digits:32" if "cifar" in name else "--config.data=digits:28"]


@pytest.fixture
def stopped_at_the_start(monkeypatch):
    def fit(*_, **__):
        raise RunError(STARTED)

    monkeypatch.setattr(train, "fit", fit)


def sweep(run, name, *flags, values=VALUES):
    """What is wrong with the answers to all values of all fields."""
    wrong = []
    names = numeric_fields(launch.load_experiment(name).Config)
    assert len(names) > 5
    for field in names:
        for value in values:
            begun = time.monotonic()
            try:
                result = run(f"--experiment={name}", *flags, f"--config.{field}={value}")
            except Exception as error:
                wrong.append(f"{field}={value}: {type(error).__name__}: {error}"[:300])
                continue
            seconds = time.monotonic() - begun
            lines = result.stderr.splitlines()
            refused = result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ")
            started = result.returncode == 1 and lines[-1] == f"stopped: {STARTED}"
            if not (refused or started) or seconds > SECONDS:
                wrong.append(f"{field}={value}: {seconds:.1f} s: {lines[-1:]}")
    return wrong


@pytest.mark.parametrize("name", FAST)
def test_no_number_ends_in_a_traceback(launch_here, stopped_at_the_start, name):
    assert not sweep(launch_here, name, "--debug", *data_of(name), values=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("debug", [["--debug"], []], ids=["debug", "full"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_number_ends_in_a_traceback_in_any_experiment(
    launch_here, stopped_at_the_start, name, debug
):
    assert not sweep(launch_here, name, *debug, *data_of(name))


@pytest.mark.slow
def test_no_number_ends_in_a_traceback_of_a_generation_model(
    launch_here, stopped_at_the_start, tmp_path
):
    parts = {}
    for part in ("text_encoder", "autoencoder"):
        parts[part.partition("_")[0]] = tmp_path / part
        command = [f"--experiment={part}_shapes", "--debug", f"--workdir={tmp_path / part}"]
        subprocess.run(
            [sys.executable, ROOT / "launch.py", *command], env=user_environment(), check=True,
            capture_output=True, timeout=240,
        )  # fmt: skip
    flags = [f"--config.{name}={place}" for name, place in parts.items()]
    result = launch_here("--experiment=generator_shapes", "--debug", *flags)
    assert STARTED in result.stderr, result.stderr
    assert not sweep(launch_here, "generator_shapes", "--debug", *flags)
