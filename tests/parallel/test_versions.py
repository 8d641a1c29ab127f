"""Untested versions of jax and jaxlib: a warning states the effects, and the rest works."""

import importlib.metadata
import sys

import jax
import pytest

from ddpm_jax.parallel import processes, sharding, xla_flags


@pytest.fixture
def untested(monkeypatch):
    """Pretend that the version of jaxlib is one that no flag was tested with."""
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9.9" if name == "jaxlib" else real(name)
    )


def test_flags_are_not_set_for_an_untested_jaxlib(untested, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_flags.tune_cpu(debug=True)
    assert xla_flags.os.environ["XLA_FLAGS"] == ""
    assert xla_flags.compiler_options(xla_flags.LATE_GATHERS) is None


def test_a_warning_states_the_effects_of_an_untested_jaxlib(untested):
    slow, memory = "convolutions' gradients on CPUs may be", "a CPU device may store all parameters"
    for mode in sharding.MODES:
        warning = sharding.make(mode).warning()
        assert warning.startswith("ddpm_jax was not tested with jaxlib 9.9.9: ")
        assert slow in warning
        assert (memory in warning) == (mode == "fsdp")


def test_there_is_no_warning_for_a_tested_jaxlib(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    assert [sharding.make(mode).warning() for mode in sharding.MODES] == ["", "", ""]
    assert len(xla_flags.compiler_options(xla_flags.LATE_GATHERS)) == 2


def test_without_the_private_client_of_jax_one_process_works_and_several_are_warned(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.distributed", None)
    monkeypatch.delattr(jax._src, "distributed", raising=False)
    assert processes.coordination_client() is None
    assert processes.missing_client_warning() == ""
    assert processes.ThreadBarrier().barrier() is not None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "was not tested" in processes.missing_client_warning()
    assert processes.ThreadBarrier().barrier() is None
