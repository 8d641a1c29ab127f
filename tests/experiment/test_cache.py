"""Caches depend on everything that their content depends on, and are rebuilt if unusable."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import cache as cache_module
from ddpm_jax.data import loader
from ddpm_jax.data.types import Loaded
from ddpm_jax.experiment import feature_networks
from ddpm_jax.experiment.inputs import load_data, record_of
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.train import train_alone
from ddpm_jax.experiment.types import Options
from ddpm_jax.tasks import pretrained_text
from helpers.data_sets import png, write
from helpers.launching import ROOT, user_environment

NOWHERE = pathlib.Path("/nowhere/at/all")
CLASSIFIER = load_experiment("classifier_digits")


def digits_run(debug):
    """Return (loaded, options) of a run on digits."""
    options = Options(debug=debug)
    return load_data(CLASSIFIER, CLASSIFIER.config.data, NOWHERE, options), options


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A cache with a classifier that a debug run trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return feature_networks.train_once(CLASSIFIER, *digits_run(debug=True), train_alone)


@pytest.fixture
def cached(pristine, tmp_path, monkeypatch):
    """A copy of the classifier, a fake training that copies it, and lists of directories.

    The first list is filled with the directories that were trained; the second one holds those that
    may already have checkpoints.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = feature_networks.feature_networks_dir() / pristine.name
    shutil.copytree(pristine, directory)
    trained_in = []

    def train(run, data):
        assert not (run.workdir / "checkpoints").exists() or run.workdir in continued
        assert len(data.train.images) == len(run.loaded.data.train.images)
        trained_in.append(run.workdir)
        shutil.copytree(pristine, run.workdir, dirs_exist_ok=True)
        return {}

    continued = []
    return directory, train, trained_in, continued


def test_debug_and_full_runs_and_other_splits_have_separate_classifiers(cached):
    directory, train, trained_in, _ = cached
    assert feature_networks.train_once(CLASSIFIER, *digits_run(debug=True), train) == directory
    assert not trained_in
    full = feature_networks.train_once(CLASSIFIER, *digits_run(debug=False), train)
    loaded, options = digits_run(debug=True)
    cut = loaded.data._replace(test=loaded.data.test.first(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_networks, "load_for", lambda *_: cut)
        other = feature_networks.train_once(CLASSIFIER, Loaded(cut), options, train)
    assert len({directory, full, other}) == 3
    assert trained_in == [full, other]


def test_a_moved_folder_has_the_same_classifier_as_before(tmp_path, monkeypatch, capfd):
    trained_in = []

    def train(run, data):
        trained_in.append(run.workdir)
        (run.workdir / "checkpoints").mkdir(parents=True)
        record = record_of(run.name, run.config, run.config.data, run.loaded, run.options)
        (run.workdir / "config.json").write_text(json.dumps(record))
        (run.workdir / "summary.json").write_text('{"metrics": {}}')
        return {}

    def train_once(name):
        loaded = Loaded(loader.load(f"folder:{tmp_path / name}"))
        return feature_networks.train_once(CLASSIFIER, loaded, Options(debug=True), train)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_networks, "load_feature_network", lambda *_: None)
    for number in range(20):
        write(tmp_path / "birds" / f"{number % 2}" / f"{number}.png", png(number))
    first = train_once("birds")
    (tmp_path / "moved").mkdir()
    (tmp_path / "birds").rename(tmp_path / "moved" / "finches")
    assert train_once("moved/finches") == first
    assert trained_in == [first]
    assert "again" not in capfd.readouterr().err
    (tmp_path / "moved" / "finches" / "0").rename(tmp_path / "moved" / "finches" / "2")
    renamed = train_once("moved/finches")  # another class
    write(tmp_path / "moved" / "finches" / "1" / "1.png", png(99))  # another image
    assert trained_in == [first, renamed, train_once("moved/finches")]
    assert len(set(trained_in)) == 3


def edit(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_checkpoints(directory):
    for path in (directory / "checkpoints").rglob("*"):
        if path.is_file():
            tear(path)


UNUSABLE = {
    "another config": lambda p: edit(
        p / "config.json", lambda r: r["config"]["train"].update(steps=7)
    ),
    "other data": lambda p: edit(p / "config.json", lambda r: r["data"].update(test=360)),
    "another experiment": lambda p: edit(p / "config.json", lambda r: r.update(experiment="a")),
    "a torn record": lambda p: tear(p / "config.json"),
    "no record": lambda p: (p / "config.json").unlink(),
    "a torn summary": lambda p: tear(p / "summary.json"),
    "a summary of another form": lambda p: (p / "summary.json").write_text("[]"),
    "torn checkpoints": damage_checkpoints,
    "no checkpoints": lambda p: shutil.rmtree(p / "checkpoints"),
}


ONLY_IF_FINISHED = {"a torn summary", "a summary of another form", "no checkpoints"}


@pytest.mark.parametrize(
    ("what", "finished"),
    [
        *((what, True) for what in UNUSABLE),
        *((what, False) for what in sorted(UNUSABLE.keys() - ONLY_IF_FINISHED)),
    ],
)
def test_an_unusable_classifier_is_trained_again_with_a_message(cached, capfd, what, finished):
    directory, train, trained_in, _ = cached
    if not finished:
        (directory / "summary.json").unlink()
    UNUSABLE[what](directory)
    assert feature_networks.train_once(CLASSIFIER, *digits_run(debug=True), train) == directory
    assert trained_in == [directory]
    assert "the classifier is trained again" in capfd.readouterr().err
    feature_networks.load_feature_network(str(directory))


def test_an_interrupted_classifier_with_the_same_record_is_resumed(cached, capfd):
    directory, train, trained_in, continued = cached
    (directory / "summary.json").unlink()
    continued.append(directory)
    assert feature_networks.train_once(CLASSIFIER, *digits_run(debug=True), train) == directory
    assert trained_in == [directory]
    assert "again" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_killed_while_its_classifier_is_trained_blocks_no_later_run(tmp_path):
    cache = tmp_path / "cache"
    command = [sys.executable, str(ROOT / "launch.py"), "--experiment=ddpm_digits",
               "--config.task.evaluation.features=classifier_digits", "--config.train.steps=4",
               "--config.task.evaluation.num_samples=20", "--config.task.sampling.steps=2",
               "--config.task.evaluation.times_per_image=2"]  # fmt: skip

    def start(name, *flags):
        return subprocess.Popen(
            [*command, f"--workdir={tmp_path / name}", *flags], text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, env=user_environment(XDG_CACHE_HOME=str(cache)),
        )  # fmt: skip

    def killed_when_a_checkpoint_is_there(name, *flags):
        before = set(cache.glob("ddpm_jax/feature_networks/*/checkpoints/[0-9]*"))
        process = start(name, *flags)
        while process.poll() is None:
            if set(cache.glob("ddpm_jax/feature_networks/*/checkpoints/[0-9]*")) - before:
                process.kill()
            time.sleep(0.01)
        process.communicate()

    killed_when_a_checkpoint_is_there("debug", "--debug")
    killed_when_a_checkpoint_is_there("full")
    for name, flags in (("debug", ["--debug"]), ("full", []), ("again", ["--debug"])):
        process = start(name, *flags)
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
    assert len(list(cache.glob("ddpm_jax/feature_networks/*"))) == 2


# Decoded images and encoded captions.


def folder_of_images(root):
    root.mkdir()
    for number in range(20):
        Image.fromarray(np.full((8, 8, 3), number * 10, np.uint8)).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"shade {number}")
    return f"folder:{root}"


def write_other_labels(directory):
    np.save(directory / "train_labels.npy", np.zeros(3, np.int32))


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: tear(directory / "train_images.npy"),
        lambda directory: tear(directory / "meta.json"),
        lambda directory: (directory / "test_captions.npy").unlink(),
        write_other_labels,
        lambda directory: np.save(
            directory / "test_images.npy", np.zeros((2, 8, 8, 3), np.float32)
        ),
    ],
)
def test_decoded_images_that_cannot_be_used_are_decoded_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = folder_of_images(tmp_path / "images")
    first = loader.load(name, validation=0)
    expected = [np.array(array) for array in first.train]  # of files that are damaged below
    (directory,) = (path.parent for path in cache_module.cache_dir().glob("decoded/*/meta.json"))
    damage(directory)
    again = loader.load(name, validation=0)
    assert again.fingerprint == first.fingerprint
    for actual, array in zip(again.train, expected, strict=True):
        np.testing.assert_array_equal(actual, array)
    assert any("were decoded again" in note for note in again.notes)
    assert not loader.load(name, validation=0).notes


def test_unusable_features_of_captions_are_computed_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def encode(name, texts):
        calls.append(name)
        tokens = np.ones((len(texts), 4, 3), np.float16)
        return pretrained_text.Features(tokens, np.ones((len(texts), 4), bool), tokens[:, 0])

    monkeypatch.setattr(pretrained_text, "encode", encode)
    texts = ["a", "b"]
    pretrained_text._cached_features("an encoder", texts)
    for damage in (tear, pathlib.Path.unlink, lambda path: np.save(path, np.ones((1, 4, 3)))):
        (path,) = tmp_path.rglob("*_tokens.npy")
        damage(path)
        assert pretrained_text._cached_features("an encoder", texts).tokens.shape == (2, 4, 3)
        assert "computed again" in capfd.readouterr().err
    assert len(calls) == 4
    assert pretrained_text._cached_features("an encoder", texts).tokens.shape == (2, 4, 3)
    assert len(calls) == 4


def test_cached_features_depend_on_the_files_of_the_encoder(tmp_path, monkeypatch):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "weights").write_text("one")
    before = pretrained_text._version(str(folder))
    (folder / "weights").write_text("another")  # the folder's modification time does not change
    assert pretrained_text._version(str(folder)) != before
