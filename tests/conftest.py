"""Eight devices forced on the host, float64 where a test asks for it, real data where it is."""

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


@pytest.hookimpl(trylast=True)  # the package is type-checked from its first import on
def pytest_configure():
    """Compile for haste, as `--debug` does: it takes far longer than to run what tests compute.

    What they state does not depend on it.  (What `launch` runs is compiled as for users.)
    """
    from ddpm_jax.parallel.xla_flags import tune_cpu

    tune_cpu(debug=True)
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def _caches(tmp_path_factory):
    """Tests share a compile cache of their own, and decode into no folder of the user's."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # all workers the same
        place = place.parent
    (place / "cache").mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")


@pytest.fixture
def x64():
    """Formulas are compared in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def original_files():
    """The folder of data sets' original files that DDPM_JAX_TEST_DATA names."""
    folder = os.environ.get("DDPM_JAX_TEST_DATA")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("DDPM_JAX_TEST_DATA names no folder of original files")
    return pathlib.Path(folder).resolve()


@pytest.fixture
def launch(tmp_path):
    """Run launch.py as a user would: launch("--experiment=...", ...) -> CompletedProcess."""

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
    """Run launch.py's `report` in this process, in a fraction of the time of `launch`."""
    import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", os.environ["XDG_CACHE_HOME"] + "/tfds")

    def run(*arguments):
        capfd.readouterr()
        code = launch.report([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run
