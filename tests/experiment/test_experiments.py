"""Every experiment runs with --debug through the command line, as a user would run it."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from helpers.launching import ROOT

EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiments/[a-z]*.py"))
# Fashion-MNIST, CIFAR-10 and a folder of images are not available in tests.
DATA = dict.fromkeys(
    ("vae_fashion_mnist", "ddpm_fashion_mnist", "classifier_fashion_mnist", "ddpm_folder"),
    "--config.data=digits:28",
) | dict.fromkeys(("ddpm_cifar10", "classifier_cifar10"), "--config.data=digits")
DATA["iddpm_cifar10"] = "--config.data=digits:32"  # its attention needs feature maps of side 8

CHAIN = "text_to_image_shapes"  # trains the parts of a generation model
RUNS = {"text_encoder_scaling": 5}  # number of runs, for experiments of many runs
PARTS = {"text_encoder_shapes", "autoencoder_shapes"}  # CHAIN trains these, too
# With digits as the data set, these experiments equal others; `test_launch.py` runs vae_mnist.
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
    debugs(CHAIN, launch, tmp_path)
    parts = tmp_path / "runs" / f"{CHAIN}-debug"
    flags = [
        f"--config.task.text_encoder={parts / 'text'}",
        f"--config.task.autoencoder={parts / 'autoencoder'}",
        "--config.task.generator.network=dit",
    ]
    debugs("generator_shapes", launch, tmp_path, *flags)


def debugs(experiment, launch, tmp_path, *flags):
    start, limit = time.perf_counter(), 120 * RUNS.get(experiment, 1)
    result = launch(f"--experiment={experiment}", "--debug", *flags, timeout=limit)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < limit  # one run takes 20 s on an idle machine
    workdir = tmp_path / "runs" / f"{experiment}-debug"
    assert (workdir / "summary.json").exists()
    assert list((workdir / "images").glob("*.png"))
    assert str(workdir.relative_to(tmp_path)) in result.stdout


@pytest.mark.slow
def test_a_diffusion_run_is_evaluated_and_sampled_with_other_settings(launch, tmp_path):
    """Settings of sampling may differ from those of the training."""
    workdir = tmp_path / "runs" / "ddpm_digits-debug"
    assert launch("--experiment=ddpm_digits", "--debug").returncode == 0
    result = launch(
        "--mode=eval",
        f"--workdir={workdir}",
        "--config.task.sampling.sampler=ddim:0.5",
        "--config.task.sampling.steps=3",
    )
    assert result.returncode == 0, result.stderr
    about = json.loads((workdir / "eval.json").read_text())["about"]
    assert about["sampler"] == "ddim:0.5"
    assert about["steps"] == 3
    out = tmp_path / "sampled.npz"
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


def write_images(folder, count, captions=False):
    """Write a few random images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"image {number % 3}")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["shapes", "shapes:64", "six", "captioned"])
@pytest.mark.parametrize(
    "experiment",
    [
        "vae_mnist", "beta_vae_mnist", "ddpm_cifar10", "vdm_digits", "classifier_digits",
        "noise_in_sampling", "text_encoder_shapes", "autoencoder_shapes",
    ],
)  # fmt: skip
def test_every_kind_of_data_set_is_trained_on_or_refused_in_one_line(
    experiment, data, launch, tmp_path
):
    if data in ("six", "captioned"):
        write_images(tmp_path / data, 6, data == "captioned")
        data = f"folder:{tmp_path / data}"
    field = "base.data" if experiment == "beta_vae_mnist" else "data"
    result = launch(
        f"--experiment={experiment}", "--debug", f"--config.{field}={data}", "--workdir=run",
        timeout=400,
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    if result.returncode == 2:
        assert len(result.stderr.strip().splitlines()) == 1
        assert "unknown field" not in result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_few_labelled_images_are_evaluated_by_a_classifier_trained_on_them(launch, tmp_path):
    """Metrics that need several test images are left out, and no metric is named after MNIST."""
    write_images(tmp_path / "birds", 6)
    result = launch(
        "--experiment=ddpm_folder", "--debug", f"--config.data=folder:{tmp_path / 'birds'}",
        "--config.task.evaluation.features=classifier_mnist", "--workdir=run",
        "--config.task.network=dit", "--config.task.network.width=16",
        "--config.task.network.depth=1", "--config.task.network.heads=2",
        "--config.task.sampling.sampler=ddim", "--config.task.sampling.steps=1",
        "--config.train.eval_every=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "precision_classifier_folder_birds" in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = set(summary["metrics"])
    assert "test/score_classifier_folder_birds_error" in names
    assert "test/classifier_accuracy_error" in names
    assert not [name for name in names if "mnist" in name or "precision" in name]
    assert summary["about"]["parameters"] == "EMA, half-life 50000 images"
