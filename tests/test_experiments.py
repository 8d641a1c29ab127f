"""Every experiment under --debug, through the command line, as a user would run it."""

import pathlib
import time

import pytest

EXPERIMENTS = sorted(
    path.stem for path in pathlib.Path(__file__).parent.parent.glob("experiments/[a-z]*.py")
)
# There is no fashion, no CIFAR-10 and no folder without a network or a user.
DATA = dict.fromkeys(
    ("vae_fashion_mnist", "ddpm_fashion_mnist", "classifier_fashion_mnist", "ddpm_folder"),
    "--config.data=digits:28",
) | dict.fromkeys(("ddpm_cifar10", "iddpm_cifar10", "classifier_cifar10"), "--config.data=digits")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_under_debug_ends_in_seconds(experiment, launch, tmp_path):
    start = time.perf_counter()
    extra = [DATA[experiment]] if experiment in DATA else []
    result = launch(f"--experiment={experiment}", "--debug", *extra)
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 60  # 20 s on an idle machine
    workdir = tmp_path / "runs" / f"{experiment}-debug"
    assert (workdir / "summary.json").exists()
    assert list((workdir / "images").glob("*.png"))
    assert str(workdir.relative_to(tmp_path)) in result.stdout
