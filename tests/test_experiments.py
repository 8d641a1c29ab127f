"""Every experiment under --debug, through the command line, as a user would run it."""

import json
import pathlib
import time

import numpy as np
import pytest

EXPERIMENTS = sorted(
    path.stem for path in pathlib.Path(__file__).parent.parent.glob("experiments/[a-z]*.py")
)
# There is no fashion, no CIFAR-10 and no folder without a network or a user.
DATA = dict.fromkeys(
    ("vae_fashion_mnist", "ddpm_fashion_mnist", "classifier_fashion_mnist", "ddpm_folder"),
    "--config.data=digits:28",
) | dict.fromkeys(("ddpm_cifar10", "iddpm_cifar10", "classifier_cifar10"), "--config.data=digits")


WHOLE = "text_to_image_shapes"  # whose parts a generation model stands on


RUNS = {"text_encoder_scaling": 5}  # of an experiment that is many
PARTS = {"text_encoder_shapes", "autoencoder_shapes"}  # which WHOLE trains, too
# Fashion-MNIST's and a folder's are MNIST's but for the data, in the place of which digits stand
# here, and ddpm_cifar10 is less than iddpm_cifar10; `test_launch.py` runs vae_mnist, too.
ALIKE = {name for name in EXPERIMENTS if name.endswith("fashion_mnist")}
ALIKE |= {"ddpm_folder", "ddpm_cifar10", "vae_mnist"}
LONG = {"text_encoder_scaling", *PARTS, *ALIKE}


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG else ())
        for name in EXPERIMENTS
        if name != "generator_shapes"
    ],
)
def test_an_experiment_under_debug_ends_in_seconds(experiment, launch, tmp_path):
    debugs(experiment, launch, tmp_path, *([DATA[experiment]] if experiment in DATA else []))


@pytest.mark.slow
def test_a_generation_model_is_trained_on_parts_of_another_run(launch, tmp_path):
    debugs(WHOLE, launch, tmp_path)
    parts = tmp_path / "runs" / f"{WHOLE}-debug"
    flags = [f"--config.{part}={parts / part}" for part in ("text", "autoencoder")]
    debugs("generator_shapes", launch, tmp_path, "--config.model=dit", *flags)


def debugs(experiment, launch, tmp_path, *flags):
    start, limit = time.perf_counter(), 120 * RUNS.get(experiment, 1)
    result = launch(f"--experiment={experiment}", "--debug", *flags, timeout=limit)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < limit  # a run: 20 s on an idle machine, where it is alone
    workdir = tmp_path / "runs" / f"{experiment}-debug"
    assert (workdir / "summary.json").exists()
    assert list((workdir / "images").glob("*.png"))
    assert str(workdir.relative_to(tmp_path)) in result.stdout


@pytest.mark.slow
def test_a_diffusion_run_is_evaluated_and_drawn_from_in_other_ways(launch, tmp_path):
    """Sampling needs no flag retyped, and how is drawn may differ from one time to the next."""
    workdir = tmp_path / "runs" / "ddpm_digits-debug"
    assert launch("--experiment=ddpm_digits", "--debug").returncode == 0
    result = launch(
        "--mode=eval",
        f"--workdir={workdir}",
        "--config.sampler=ddim:0.5",
        "--config.sample_steps=3",
    )
    assert result.returncode == 0, result.stderr
    about = json.loads((workdir / "eval.json").read_text())["about"]
    assert about["sampler"] == "ddim:0.5"
    assert about["steps"] == 3
    out = tmp_path / "drawn.npz"
    result = launch(
        "--mode=sample", f"--workdir={workdir}", "--label=3", "--guidance=2", "--steps=2",
        "--num_samples=5", f"--out={out}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert np.load(out)["images"].shape == (5, 8, 8, 1)
    for flags, says in (
        (["--sampler=heun:1"], "heun takes no number"),
        (["--steps=1001"], "this run's schedule has 1000 steps"),
        (["--label=10"], "there are 10 classes"),
    ):
        result = launch("--mode=sample", f"--workdir={workdir}", *flags)
        assert result.returncode == 2
        assert says in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
