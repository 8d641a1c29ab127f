"""Guidance models: trained runs that guide the sampling of other runs."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import override, replace
from ddpm_jax.config_records import to_record
from ddpm_jax.data.loader import load
from ddpm_jax.data.types import DataInfo, Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import guidance_models, sample
from ddpm_jax.experiment.load import load_recorded
from ddpm_jax.experiment.recorded import read
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.requests import Request
from ddpm_jax.experiment.types import Options, bind
from ddpm_jax.nn.classifier import ClassifierNetwork
from helpers.launching import ROOT, user_environment

OPTIONS = Options(debug=True)
CLASSIFIER = ("--experiment=classifier_digits", "--config.task.schedule=cosine")
TINY = {
    "train.steps": "2", "train.eval_every": "0", "task.network": "dit", "task.network.width": "16",
    "task.network.depth": "1", "task.evaluation.num_samples": "8", "task.conditional": "false",
}  # fmt: skip
DIGITS = DataInfo("digits", (8, 8, 1), 17, 10)


def config_of(guidance_model, classes=10):
    """Return the config of the tiny unconditional run with a guidance model, or "labels"."""
    experiment = load_experiment("ddpm_digits")
    config = override(experiment.config, TINY, experiment.debug, experiment.alternatives)
    config = replace(config, {"task.sampling.guidance_model": guidance_model})
    return bind(config, DIGITS._replace(classes=classes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of a noisy classifier and of a model that it guides and evaluates."""
    directory = tmp_path_factory.mktemp("runs")
    tiny = [f"--config.{name}={value}" for name, value in TINY.items()]
    guidance = [
        "--config.task.sampling.guidance_model=classifier",
        "--config.task.sampling.guidance=2",
        "--config.task.evaluation.features=./classifier",
    ]
    for name, flags in (
        ("classifier", CLASSIFIER),
        ("guided", ["--experiment=ddpm_digits", *tiny, *guidance]),
    ):
        command = [sys.executable, ROOT / "launch.py", *flags, "--debug", f"--workdir={name}"]
        result = subprocess.run(
            command,
            cwd=directory,
            env=user_environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, result.stderr
    return directory


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.slow
def test_a_noisy_classifier_reports_its_accuracy_by_noise_level(runs):
    metrics = summary(runs / "classifier")["metrics"]
    levels = [metrics[f"test/accuracy_t_{t / 10:.1f}"] for t in range(10)]
    assert metrics["test/accuracy"] == pytest.approx(np.mean(levels))
    assert (runs / "classifier" / "images" / "levels.png").exists()


def test_a_classifier_of_clean_images_has_no_parameters_for_the_noise_level():
    def names(**settings):
        net, image = ClassifierNetwork(10, (8,), **settings), jnp.zeros((1, 8, 8, 1))
        return set(jax.eval_shape(net.init, jax.random.key(0), image)["params"])

    assert names() == {"conv_0", "features", "logits"}
    assert names(noisy=True) == names() | {"time_1", "time_2", "told_0"}


@pytest.mark.slow
def test_an_unconditional_run_is_sampled_with_the_labels_of_a_classifier(runs):
    result = summary(runs / "guided")
    assert result["about"]["guidance_model"].startswith("classifier: classifier_digits, step 6, /")
    assert result["about"]["guidance"] == 2.0
    assert 0 <= result["metrics"]["test/classifier_accuracy"] <= 1


@pytest.mark.slow
def test_guidance_by_the_run_itself_changes_no_sample_and_by_a_classifier_does(runs, tmp_path):
    def sample_with(model, guidance, label=None):
        run, out = read(runs / "guided")._replace(config=config_of(model)), tmp_path / "sampled.npz"
        trained, request = (
            functools.partial(load_recorded, run),
            Request(label=label, guidance=guidance),
        )
        sample.sample(trained, run.workdir, OPTIONS, request, 4, out)
        return np.load(out)["images"].astype(int)

    alone = sample_with("labels", None)
    np.testing.assert_allclose(sample_with(str(runs / "guided"), 3.0), alone, atol=1)
    assert (sample_with(str(runs / "classifier"), 300.0, label=3) != alone).any()


@pytest.mark.slow
def test_an_evaluation_is_guided_by_a_run(runs, launch, tmp_path):
    shutil.copytree(runs / "guided", tmp_path / "weaker")
    flags = [
        f"--config.task.sampling.guidance_model={tmp_path / 'weaker'}",
        "--config.task.sampling.guidance=2",
    ]
    result = launch("--mode=eval", f"--workdir={runs / 'guided'}", *flags)
    assert result.returncode == 0, result.stderr
    about = json.loads((runs / "guided" / "eval.json").read_text())["about"]
    assert about["guidance_model"].startswith("diffusion: ddpm_digits, step 2, /")
    assert about["guidance"] == 2.0


def record(directory, experiment="ddpm_digits", like="", changes=None, shape=(8, 8, 1), **more):
    """Write the record of a run, with the config of the experiment `abstract_state`."""
    directory.mkdir(exist_ok=True)
    classes = [str(i) for i in range(10)]
    data = {"name": "digits", "title": "others", "shape": shape, "levels": 17, "classes": classes}
    like = like or (experiment if isinstance(experiment, str) else "ddpm_digits")
    config = {**to_record(replace(load_experiment(like).config, changes or {})), **more}
    written = {"format": 2, "experiment": experiment, "config": config, "data": data, "seed": 0}
    (directory / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            None,
            "there is no run; train the guidance model first, or give "
            "--config.task.sampling.guidance_model=labels",
        ),
        (dict(experiment="os", like="ddpm_digits"), "a run of os, but there is no file"),
        (
            dict(experiment="../launch", like="ddpm_digits"),
            "a run of ../launch, but there is no file",
        ),
        (dict(experiment=["os"]), "config.json is damaged"),
        (dict(experiment="beta_vae_mnist"), "beta_vae_mnist trains several models"),
        (dict(experiment="vae_digits"), "a run of vae_digits cannot guide sampling"),
        (dict(experiment="classifier_digits"), "trained with --config.task.schedule=cosine"),
        (dict(gone=1), "with unknown config fields: gone"),
        (
            dict(shape=(28, 28, 1), changes={"task.network.attention_sizes": ()}),
            "was trained on images of 28x28x1, not 8x8x1; give a run on the same data",
        ),
        (
            dict(changes={"task.conditional": False}),
            "the network has 0 classes and must have 10",
        ),
        (dict(), "there is no checkpoint"),
    ],
)
def test_a_run_that_cannot_guide_is_an_error_of_one_line(tmp_path, written, says):
    directory = tmp_path / "model"
    if written is not None:
        record(directory, **written)
    config = load_experiment("ddpm_digits").config
    config = bind(replace(config, {"task.sampling.guidance_model": str(directory)}), DIGITS)
    with pytest.raises(UserError) as error:
        guidance_models.guidance_of(config)()
    assert says in str(error.value)
    assert str(error.value).startswith(f"--config.task.sampling.guidance_model={directory}: ")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_guidance_model_of_other_classes_is_refused(runs, tmp_path):
    def refused(says, directory=runs / "classifier", **changes):
        with pytest.raises(UserError, match=says):
            guidance_models.guidance_of(config_of(str(directory), **changes))()

    refused("has 10 classes and must have 3", classes=3)
    record(tmp_path)
    refused("has 10 classes and must have 0", directory=tmp_path)
    clothes = load("digits")._replace(classes=tuple("abcdefghij"), title="clothes")
    with pytest.raises(UserError, match="whose classes are not those of clothes"):
        guidance_models.check_guidance(config_of(str(runs / "classifier")), Loaded(clothes))


def test_a_wrong_guidance_model_is_reported_before_training(launch):
    result = launch(
        "--experiment=ddpm_digits", "--debug", "--config.task.sampling.guidance_model=nowhere"
    )
    assert result.returncode == 2
    assert "nowhere: there is no run" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
