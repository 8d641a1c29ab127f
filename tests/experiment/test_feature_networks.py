"""A classifier that judges: its name, its one training, its data."""

import dataclasses

import numpy as np

from ddpm_jax.data.loader import load
from ddpm_jax.data.types import Loaded
from ddpm_jax.experiment import feature_networks as judges
from ddpm_jax.experiment import inputs
from ddpm_jax.experiment.inputs import Options
from ddpm_jax.metrics.pixels import to_images
from experiments import classifier_digits


def test_a_judge_is_called_after_the_data_that_it_was_trained_on():
    names = {
        "mnist": "classifier_mnist",
        "digits": "classifier_digits",
        "digits:28": "classifier_digits_28",
        "folder:/home/of/mnist birds/my.flowers": "classifier_folder_my_flowers",
        "imagenet_resized/32x32": "classifier_imagenet_resized_32x32",
    }
    assert {data: judges.judge_name(data) for data in names} == names


def test_a_classifier_is_trained_once_and_judges(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, options = Loaded(load("digits")), Options(debug=True)

    @dataclasses.dataclass(frozen=True)
    class Config:
        judge: str = "auto"
        fid: bool = False

    config = judges.with_judge(classifier_digits, Config(), loaded, options)
    assert "training classifier_digits once" in capfd.readouterr().err
    assert judges.with_judge(classifier_digits, Config(), loaded, options) == config
    assert "training" not in capfd.readouterr().err
    assert judges.with_judge(classifier_digits, config, loaded, options) == config
    judge = judges.load_judge(classifier_digits, config.judge)
    features, logs = judge.see(to_images(loaded.data.test.images[:7], 17))
    assert judge.name == "classifier_digits"
    assert features.shape == (7, 64)
    np.testing.assert_allclose(np.exp(logs).sum(1), 1, rtol=1e-5)
    none = Config("none")
    assert judges.with_judge(classifier_digits, none, loaded, options) == none


def test_a_judge_reads_its_data_where_the_run_read_them(monkeypatch):
    """A resumed run knows the folder from its record, not from the command line."""
    asked = []
    monkeypatch.setattr(
        inputs, "load", lambda *arguments: asked.append(arguments) or load("digits")
    )
    loaded = Loaded(load("digits"), data_dir="/where/the/run/read")
    inputs.load_for(classifier_digits.Config(validation=7), loaded, Options())
    assert asked == [("digits", "/where/the/run/read", 7, True)]
