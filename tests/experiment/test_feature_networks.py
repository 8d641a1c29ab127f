"""Feature networks: the name of a classifier, its single training, and its data set."""

import numpy as np
import pytest

from ddpm_jax.config import replace
from ddpm_jax.data.loader import load
from ddpm_jax.data.types import Loaded, info_of
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import feature_networks, inputs
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.train import train_alone
from ddpm_jax.experiment.types import Dataset, Options, bind
from ddpm_jax.metrics.pixels import to_images


def test_a_classifier_is_named_after_the_data_that_it_was_trained_on():
    names = {
        "mnist": "classifier_mnist",
        "digits": "classifier_digits",
        "digits:28": "classifier_digits_28",
        "folder:/home/of/mnist birds/my.flowers": "classifier_folder_my_flowers",
        "imagenet_resized/32x32": "classifier_imagenet_resized_32x32",
    }
    assert {data: feature_networks.feature_network_name(data) for data in names} == names


def test_a_classifier_is_trained_once_and_extracts_features(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, options = Loaded(load("digits")), Options(debug=True)

    config = bind(load_experiment("ddpm_digits").config, info_of(loaded.data))
    assert config.task.evaluation.features == ("classifier_digits",)

    def never(run, data):
        raise AssertionError("a network is trained again")

    assert feature_networks.check_features(config, loaded) == config
    (first,) = feature_networks.load_features(config, loaded, options, train_alone)
    assert "training classifier_digits once" in capfd.readouterr().err
    (again,) = feature_networks.load_features(config, loaded, options, never)
    assert "training" not in capfd.readouterr().err
    directory = feature_networks.train_once(
        load_experiment("classifier_digits"), loaded, options, never
    )
    by_directory = replace(config, {"task.evaluation.features": (str(directory),)})
    assert feature_networks.check_features(by_directory, loaded) == by_directory
    (third,) = feature_networks.load_features(by_directory, loaded, options, never)
    network = feature_networks.load_feature_network(str(directory))
    assert [load().about for load in (first, again, third)] == [network.about] * 3
    features, logs = network.extract(to_images(loaded.data.test.images[:7], 17))
    assert network.name == "classifier_digits"
    assert features.shape == (7, 64)
    np.testing.assert_allclose(np.exp(logs).sum(1), 1, rtol=1e-5)
    none = replace(config, {"task.evaluation.features": ()})
    assert feature_networks.check_features(none, loaded) == none
    assert feature_networks.load_features(none, loaded, options, never) == ()


def test_without_labels_there_is_no_classifier_and_an_unknown_name_is_an_error(capfd):
    loaded = Loaded(load("digits"))
    config = bind(load_experiment("ddpm_digits").config, info_of(loaded.data))
    bare = Loaded(loaded.data._replace(classes=()))
    assert feature_networks.check_features(config, bare).task.evaluation.features == ()
    assert "the data set has no labels" in capfd.readouterr().err
    for name, says in (
        ("classifier_digit", 'no feature network "classifier_digit"; did you mean "classifier_d'),
        ("auto", 'no feature network "auto"'),
        ("no/where", "no finished run of a classifier in .*no/where"),
    ):
        odd = replace(config, {"task.evaluation.features": (name,)})
        with pytest.raises(UserError, match=says):
            feature_networks.check_features(odd, loaded)


def test_a_classifier_reads_the_data_set_from_the_directory_of_the_run(monkeypatch):
    """A resumed run takes the directory from its record, not from the command line."""
    calls = []
    monkeypatch.setattr(
        inputs, "load", lambda *arguments: calls.append(arguments) or load("digits")
    )
    loaded = Loaded(load("digits"), data_dir="/where/the/run/read")
    inputs.load_for(Dataset("digits", validation=7), loaded, Options())
    assert calls == [("digits", "/where/the/run/read", 7, True)]
