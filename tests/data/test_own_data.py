"""Runs on a folder of images: log lines, and folders that have moved or changed."""

import json
import shutil

import numpy as np
import pytest

import launch
from ddpm_jax.data import loader
from helpers.data_sets import png, write
from helpers.launching import expect_one_line

VAE = (
    "--experiment=vae_digits",
    "--debug",
    "--config.train.steps=2",
    "--config.task.network.hidden=8",
)
CLASSIFIER = ("--experiment=classifier_digits", "--debug", "--config.train.steps=2")


def images(folder, count, first=0):
    for number in range(first, first + count):
        write(folder / f"{number}.png", png(number))


def test_a_classifier_skips_images_without_a_class_and_logs_them(tmp_path, launch_here):
    for name, first in (("a", 0), ("b", 30)):
        images(tmp_path / "images" / "train" / name, 10, first)
        images(tmp_path / "images" / "test" / name, 3, first + 10)
    images(tmp_path / "images" / "train", 4, 70)
    images(tmp_path / "images" / "test", 2, 80)
    result = launch_here(*CLASSIFIER, "--config.data=folder:images", "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert "2 classes: a, b\n" in result.stderr
    assert "6 of 32 images are in no class folder and have no class" in result.stderr
    assert "test images that have no class" in result.stderr
    assert "folder images: skipped " in result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a directory with a folder of images and a run on it."""
    directory = tmp_path_factory.mktemp("own")
    for name, first in (("b", 0), ("a\u2028\x1b[31m", 20)):
        images(directory / "images" / name, 12, first)
    command = [
        *VAE,
        f"--config.data=folder:{directory / 'images'}",
        f"--workdir={directory / 'run'}",
    ]
    assert launch.report(command) == 0
    return directory


@pytest.fixture
def moved_run(trained, tmp_path, monkeypatch):
    """Return a directory with a copy of the run, whose images are now in `moved`."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "images", tmp_path / "moved")  # every file has a new time
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(str(trained / "images"), str(tmp_path / "gone")))
    assert str(tmp_path / "gone") in path.read_text()
    return tmp_path


def test_a_missing_folder_is_an_error_of_one_line(moved_run, launch_here):
    result = launch_here("--mode=eval", "--workdir=run")
    message = "there is no folder .*gone, which held the data .*; .* as --config.data=folder"
    expect_one_line(result, message)


def test_an_evaluation_accepts_a_folder_that_moved(moved_run, launch_here):
    for where in ("moved", "./moved/../moved/"):
        result = launch_here("--mode=eval", "--workdir=run", f"--config.data=folder:{where}")
        assert result.returncode == 0, result.stderr
    before = json.loads((moved_run / "run" / "summary.json").read_text())["metrics"]
    actual = json.loads((moved_run / "run" / "eval.json").read_text())["metrics"]
    for name, value in actual.items():
        assert value == pytest.approx(before[name], rel=1e-4), name


def test_a_run_resumes_with_a_folder_that_moved(moved_run, launch_here):
    result = launch_here(
        *VAE, "--config.data=folder:moved", "--config.train.steps=4", "--workdir=run"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "resuming at step 2" in result.stderr
    record = json.loads((moved_run / "run" / "config.json").read_text())
    assert record["data"]["name"] == f"folder:{moved_run / 'moved'}"


def changed(folder):
    (folder / "b" / "0.png").write_bytes(png(99))


def fewer(folder):
    (folder / "b" / "0.png").unlink()


def renamed(folder):
    (folder / "b").rename(folder / "c")


@pytest.mark.parametrize("change", [changed, fewer, renamed])
def test_other_images_are_refused(change, moved_run, launch_here):
    change(moved_run / "moved")
    result = launch_here("--mode=eval", "--workdir=run", "--config.data=folder:moved")
    expect_one_line(
        result, "holds a run with another setting .*data (fingerprint|train|classes) was"
    )


@pytest.mark.parametrize("data", ["digits", "folder:nowhere", "nonsense", "folder:run"])
def test_other_data_are_refused(data, moved_run, launch_here):
    result = launch_here("--mode=eval", "--workdir=run", f"--config.data={data}")
    expect_one_line(result, 'another setting|no folder "nowhere"|no data set "nonsense"|same size')


def test_sampling_refuses_a_data_set(moved_run, launch_here):
    result = launch_here("--mode=sample", "--workdir=run", "--config.data=folder:moved")
    expect_one_line(result, "--config.data cannot change after the run in run")


def test_classes_are_printed_without_control_characters(trained, tmp_path, launch_here):
    data = f"--config.data=folder:{trained / 'images'}"
    result = launch_here(*VAE, data, "--workdir=again")
    assert result.returncode == 0, result.stderr
    assert r"2 classes: a\u2028\x1b[31m, b" in result.stderr
    assert all(character.isprintable() or character == "\n" for character in result.stderr)


def test_labels_from_the_cache_equal_the_decoded_labels(tmp_path):
    images(tmp_path / "a", 4)
    images(tmp_path, 4, 4)
    first = loader.load(f"folder:{tmp_path}", validation=0)
    again = loader.load(f"folder:{tmp_path}", validation=0)
    for part, cached in zip((first.train, first.test), (again.train, again.test), strict=True):
        np.testing.assert_array_equal(part.labels, cached.labels)
    assert set(np.concatenate([first.train.labels, first.test.labels])) == {-1, 0}
