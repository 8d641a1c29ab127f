"""Runs on the user's own images: what is logged, labels of -1, a folder that moved, prompts."""

import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import launch
from ddpm_jax.data import loader
from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.diffusion.schedules import cosine
from ddpm_jax.errors import UserError
from ddpm_jax.nn.classifier import Classifier
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.sharding import make
from ddpm_jax.tasks.classifier import classifier_task, labelled
from ddpm_jax.tasks.diffusion import diffusion_task
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vdm import vdm_task
from helpers.data_sets import png, write
from helpers.launching import expect_one_line

VAE = ("--experiment=vae_digits", "--debug", "--config.steps=2", "--config.hidden=8")
CLASSIFIER = ("--experiment=classifier_digits", "--debug", "--config.steps=2")


def images(folder, count, first=0):
    for number in range(first, first + count):
        write(folder / f"{number}.png", png(number))


# Labels of -1.


def batch(labels):
    count = len(labels)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    return jax.tree.map(jnp.asarray, Batch(pixels, np.array(labels), np.arange(count)))


@pytest.fixture(scope="module")
def classifier():
    task = classifier_task(Classifier(3, (4,), 4, 0.0), (8, 8, 1), 256, eval_batch=4)
    return task, task.init(jax.random.key(0), batch([0]))[0]


def losses(task, params, labels):
    keys = jax.random.split(jax.random.key(1), len(labels))
    return task.loss(params, {}, batch(labels), keys, train=True, gather=lambda x: x)


def test_an_image_without_a_class_teaches_a_classifier_nothing(classifier):
    task, params = classifier
    loss, metrics, _ = losses(task, params, [0, -1, 2, -1])
    assert (np.asarray(loss) == 0).tolist() == [False, True, False, True]
    assert not np.asarray(metrics["accuracy"])[1::2].any()
    one = jax.grad(lambda p: losses(task, p, [0, -1, 2, -1])[0].sum())(params)
    other = jax.grad(lambda p: losses(task, p, [0, 1, 2, 2])[0][::2].sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_a_classifier_is_trained_and_measured_on_images_with_a_class(classifier, capfd):
    task, params = classifier

    def split(labels, shown=None):
        rows = np.arange(len(labels)) if shown is None else shown
        some = batch(labels)
        return Split(np.asarray(some.images)[rows], np.asarray(some.labels)[rows])

    labels = [0, -1, 2, -1, 1, 1]
    kept = np.flatnonzero(np.array(labels) >= 0)
    loose = Data("x", "x", split(labels), split(labels), 256, ("a", "b", "c"), "")
    clean = loose._replace(train=split(labels, kept), test=split(labels, kept))
    found = labelled(loose)
    assert capfd.readouterr().err == "x: skipped 2 train and 2 test images that have no class\n"
    assert np.asarray(found.train.labels).tolist() == [0, 2, 1, 1]
    np.testing.assert_array_equal(np.asarray(found.train.images), clean.train.images)
    figures = [
        task.evaluate(params, {}, data, split="test", seed=0, full=True, spread=make()).metrics
        for data in (found, labelled(clean))
    ]
    assert figures[0] == figures[1]
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="none of the 2 test images of x has a class"):
        labelled(loose._replace(test=split([-1, -1])))


def unet(classes):
    return UNet(1, channels=4, multipliers=(1,), blocks=1, attention_sizes=(), classes=classes)


@pytest.mark.parametrize("task_of", [diffusion_task, vdm_task])
def test_an_image_without_a_class_trains_a_conditional_generator_as_no_class(task_of):
    if task_of is diffusion_task:
        task = task_of(unet(3), cosine(), (8, 8, 1), 256, label_dropout=0.0, batch_size=4)
    else:
        ends, sampling = (13.0, -5.0), Sampling()
        task = task_of(
            unet(3), (8, 8, 1), 256, ends=ends, sampling=sampling, batch_size=4, eval_batch=4,
            eval_times=1,
        )  # fmt: skip
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch([0]))
    noise = jax.random.split(jax.random.key(2), 100)
    leaves, tree = jax.tree.flatten(params)  # where every layer is at work
    leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, noise, strict=False)]
    params = jax.tree.unflatten(tree, leaves)
    loss = jax.jit(functools.partial(task.loss, train=True, gather=lambda x: x))
    keys = jax.random.split(jax.random.key(1), 4)
    none, null, last = (
        np.asarray(loss(params, fixed, batch([0, label, 1, label]), keys)[0])
        for label in (-1, 3, 2)
    )
    np.testing.assert_array_equal(none, null)
    assert (none != last).tolist() == [False, True, False, True]


def test_a_classifier_skips_loose_images_and_logs_them(tmp_path, launch_here):
    for name, first in (("a", 0), ("b", 30)):
        images(tmp_path / "images" / "train" / name, 10, first)
        images(tmp_path / "images" / "test" / name, 3, first + 10)
    images(tmp_path / "images" / "train", 4, 70)
    images(tmp_path / "images" / "test", 2, 80)
    result = launch_here(*CLASSIFIER, "--config.data=folder:images", "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert "2 classes: a, b\n" in result.stderr
    assert "6 of 32 images lie beside the class folders: no class" in result.stderr
    assert "test images that have no class" in result.stderr
    assert "folder images: skipped " in result.stderr


# A folder that moved.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images and a run on it, in one directory."""
    place = tmp_path_factory.mktemp("own")
    for name, first in (("b", 0), ("a\u2028\x1b[31m", 20)):
        images(place / "images" / name, 12, first)
    command = [*VAE, f"--config.data=folder:{place / 'images'}", f"--workdir={place / 'run'}"]
    assert launch.report(command) == 0
    return place


@pytest.fixture
def own(trained, tmp_path, monkeypatch):
    """A copy of the run, whose images are in `moved` and no more where they were."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "images", tmp_path / "moved")  # every file has a new time
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(str(trained / "images"), str(tmp_path / "gone")))
    assert str(tmp_path / "gone") in path.read_text()
    return tmp_path


def test_a_folder_that_moved_is_asked_for_in_one_line(own, launch_here):
    result = launch_here("--mode=eval", "--workdir=run")
    says = (
        "the folder .*gone, where the data .* were, is not there; give .* as --config.data=folder"
    )
    expect_one_line(result, says)


def test_an_evaluation_takes_a_folder_that_moved(own, launch_here):
    for where in ("moved", "./moved/../moved/"):
        result = launch_here("--mode=eval", "--workdir=run", f"--config.data=folder:{where}")
        assert result.returncode == 0, result.stderr
    before = json.loads((own / "run" / "summary.json").read_text())["metrics"]
    found = json.loads((own / "run" / "eval.json").read_text())["metrics"]
    for name, value in found.items():
        assert value == pytest.approx(before[name], rel=1e-4), name


def test_a_run_goes_on_with_a_folder_that_moved(own, launch_here):
    result = launch_here(
        *VAE, "--config.data=folder:moved", "--config.steps=4", "--workdir=run"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "resuming at step 2" in result.stderr
    record = json.loads((own / "run" / "config.json").read_text())
    assert record["data"]["name"] == f"folder:{own / 'moved'}"


def changed(folder):
    (folder / "b" / "0.png").write_bytes(png(99))


def fewer(folder):
    (folder / "b" / "0.png").unlink()


def renamed(folder):
    (folder / "b").rename(folder / "c")


@pytest.mark.parametrize("change", [changed, fewer, renamed])
def test_other_images_are_refused(change, own, launch_here):
    change(own / "moved")
    result = launch_here("--mode=eval", "--workdir=run", "--config.data=folder:moved")
    expect_one_line(
        result, "holds a run with another setting .*data (fingerprint|train|classes) was"
    )


@pytest.mark.parametrize("data", ["digits", "folder:nowhere", "nonsense", "folder:run"])
def test_other_data_are_refused(data, own, launch_here):
    result = launch_here("--mode=eval", "--workdir=run", f"--config.data={data}")
    expect_one_line(result, 'another setting|no folder "nowhere"|no data set "nonsense"|one size')


def test_sampling_takes_no_data(own, launch_here):
    result = launch_here("--mode=sample", "--workdir=run", "--config.data=folder:moved")
    expect_one_line(result, "--config.data is what the run in run was trained with")


def test_classes_are_printed_without_control_characters(trained, tmp_path, launch_here):
    data = f"--config.data=folder:{trained / 'images'}"
    result = launch_here(*VAE, data, "--workdir=again")
    assert result.returncode == 0, result.stderr
    assert r"2 classes: a\u2028\x1b[31m, b" in result.stderr
    assert all(character.isprintable() or character == "\n" for character in result.stderr)


# Prompts.


@pytest.fixture
def prompts(tmp_path):
    launch.define_flags()
    launch.parse([])

    def read(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return launch.prompts_of(str(path))

    return read


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\nb\n", ("a", "b")),
        ("a\r\n\r\n \t\nb", ("a", "b")),
        ("\ufeffa\nb", ("a", "b")),
        ("a\u2028b\x85c\nd\x0ce\x1d", ("a\u2028b\x85c", "d\x0ce\x1d")),
        ("\ufeff\n\ufeffb", ("\ufeffb",)),
    ],
)
def test_prompts_are_lines_that_end_in_a_line_feed(content, expected, prompts):
    assert prompts(content.encode()) == expected


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "cannot be read: it is not a regular file"),
        (os.mkdir, "cannot be read: it is not a regular file"),
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: os.symlink(path, path), "cannot be read: Too many levels"),
        (lambda path: pathlib.Path(path).write_bytes(b"\xff\xfea\0"), "it is no text in UTF-8"),
        (lambda path: pathlib.Path(path).write_bytes(b"\xef\xbb\xbf\n \n"), "holds no prompts"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_named(make, says, tmp_path):
    launch.define_flags()
    launch.parse([])
    make(str(tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match=says):
        launch.prompts_of(str(tmp_path / "prompts.txt"))


def test_labels_of_the_cache_are_those_that_were_decoded(tmp_path):
    images(tmp_path / "a", 4)
    images(tmp_path, 4, 4)
    first = loader.load(f"folder:{tmp_path}", validation=0)
    again = loader.load(f"folder:{tmp_path}", validation=0)
    for one, other in zip((first.train, first.test), (again.train, again.test), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
    assert set(np.concatenate([first.train.labels, first.test.labels])) == {-1, 0}
