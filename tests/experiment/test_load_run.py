"""A trained run as a library, whose functions `--mode=sample` calls, too."""

import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax
import launch
from ddpm_jax import plots
from ddpm_jax.errors import UserError
from helpers.launching import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with short runs of three tasks, in runs/."""
    directory = tmp_path_factory.mktemp("library")
    for name in ("ddpm_digits", "vae_digits", "classifier_digits"):
        arguments = [f"--experiment={name}", "--debug", f"--workdir={directory / 'runs' / name}"]
        assert launch.report([*arguments, "--config.train.steps=2"]) == 0
    return directory


def test_samples_equal_those_of_the_command_line(folder):
    out = folder / "images.npz"
    workdir = folder / "runs" / "ddpm_digits"
    command = ["--mode=sample", f"--workdir={workdir}", f"--out={out}", "--num_samples=5"]
    assert launch.report([*command, "--seed=3", "--guidance=2"]) == 0
    images = ddpm_jax.load_run(workdir).sample(5, seed=3, guidance=2.0)
    saved = np.load(out)["images"]
    np.testing.assert_array_equal(plots.to_uint8(images), saved)


def test_a_denoiser_predicts_x0_and_eps_that_add_up_to_xt(folder):
    run = ddpm_jax.load_run(folder / "runs" / "ddpm_digits")
    labels, logsnr = jnp.array([1, 2]), jnp.asarray(0.5)
    xt = jnp.ones((2, 8, 8, 1)) * 0.1
    prediction = run.denoiser(labels)(xt, logsnr)
    alpha, sigma = jnp.sqrt(1 / (1 + jnp.exp(-logsnr))), jnp.sqrt(1 / (1 + jnp.exp(logsnr)))
    np.testing.assert_allclose(alpha * prediction.x0 + sigma * prediction.eps, xt, atol=1e-5)
    other = run.denoiser(labels, guidance=4.0)(xt, logsnr)
    assert not np.allclose(other.x0, prediction.x0)


def test_what_a_run_cannot_do_is_an_error(folder):
    with pytest.raises(UserError, match="has no denoiser"):
        ddpm_jax.load_run(folder / "runs" / "vae_digits").denoiser()
    with pytest.raises(UserError, match="no images"):
        ddpm_jax.load_run(folder / "runs" / "classifier_digits").sample(1)
    with pytest.raises(UserError, match="there is no run"):
        ddpm_jax.load_run(folder / "empty")


def test_the_example_of_the_readme_runs(folder, monkeypatch):
    text = (ROOT / "README.md").read_text()
    pattern = r"```python\n(import numpy as np\n\nimport ddpm_jax\n.*?)```"
    (snippet,) = re.findall(pattern, text, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(snippet, names)
    assert names["images"].shape == names["prediction"].x0.shape == (16, 8, 8, 1)


def test_importing_the_package_loads_no_jax():
    program = "import sys, ddpm_jax; print(ddpm_jax.__all__, 'jax' in sys.modules)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "['load_run'] False\n", result.stderr
