"""Versions of jax and jaxlib that are not known: what is lost is said, and the rest works."""

import importlib.metadata
import sys

import jax
import pytest

from ddpm_jax.parallel import processes, sharding, xla_flags


@pytest.fixture
def unknown(monkeypatch):
    """A jaxlib that no flag was tried with."""
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "9.9.9" if name == "jaxlib" else real(name)
    )


def test_an_unknown_jaxlib_gets_no_flag(unknown, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_flags.tune_cpu(debug=True)
    assert xla_flags.os.environ["XLA_FLAGS"] == ""
    assert xla_flags.compiler_options(xla_flags.LATE_GATHERS) is None


def test_what_an_unknown_jaxlib_loses_is_said(unknown):
    slow, whole = "convolutions' gradients on CPUs may be", "fsdp on CPUs may hold all parameters"
    for mode in sharding.MODES:
        warning = sharding.make(mode).warning()
        assert warning.startswith("jaxlib 9.9.9 is not known: ")
        assert slow in warning
        assert (whole in warning) == (mode == "fsdp")


def test_a_known_jaxlib_loses_nothing(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    assert [sharding.make(mode).warning() for mode in sharding.MODES] == ["", "", ""]
    assert len(xla_flags.compiler_options(xla_flags.LATE_GATHERS)) == 2


def test_without_jaxs_private_client_one_process_works_and_several_are_warned(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.distributed", None)
    monkeypatch.delattr(jax._src, "distributed", raising=False)
    assert processes.coordination_client() is None
    assert processes.without_client() == ""
    assert processes.Meeting().barrier() is not None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "is not known" in processes.without_client()
    assert processes.Meeting().barrier() is None
