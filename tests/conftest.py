"""Eight devices simulated on the CPU, and fixtures for float64, real data and `launch.py`."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pathlib
import subprocess
import sys

import jax
import pytest

pytest.register_assert_rewrite("helpers")

from helpers.launching import ROOT, Result, user_environment  # noqa: E402


@pytest.hookimpl(trylast=True)  # after the plugin that type-checks the package during import
def pytest_configure():
    """Compile with few optimisations, as `--debug` does, because tests spend most time compiling.

    The results of tests do not depend on it. `launch` compiles with all optimisations, as users do.
    """
    from ddpm_jax.parallel.xla_flags import tune_cpu

    tune_cpu(debug=True)
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory):
    """Let all tests share a temporary cache directory instead of that of the user."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # all workers share one directory
        directory = directory.parent
    (directory / "cache").mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")


@pytest.fixture
def x64():
    """Enable float64, in which tests compare formulas."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def original_files():
    """The directory of original data set files, which DDPM_JAX_TEST_DATA names."""
    folder = os.environ.get("DDPM_JAX_TEST_DATA")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("DDPM_JAX_TEST_DATA does not name a directory of original files")
    return pathlib.Path(folder).resolve()


@pytest.fixture
def launch(tmp_path):
    """Return launch("--experiment=...", ...) -> CompletedProcess, which runs launch.py."""

    def run(*arguments, timeout=240, **environment):
        return subprocess.run(
            [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)],
            cwd=tmp_path,
            env=user_environment(**environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def launch_here(tmp_path, monkeypatch, capfd):
    """Return a function that runs launch.py in this process, which is faster than `launch`."""
    import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", os.environ["XDG_CACHE_HOME"] + "/tfds")

    def run(*arguments):
        capfd.readouterr()
        code = launch.report([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run
