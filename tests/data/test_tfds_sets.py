"""Data sets in TFDS format with unusual splits, labels and captions."""

import shutil

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import loader
from ddpm_jax.data.tokenizer import untokenize
from ddpm_jax.errors import UserError
from helpers.data_sets import encoded, pixels, png, store
from helpers.launching import expect_one_line


def rows(count, first=0, **features):
    """Return examples of numbered images; each feature is a function of the number."""
    return [
        {"image": png(i), **{name: of(i) for name, of in features.items()}}
        for i in range(first, first + count)
    ]


def load(out, validation=0):
    return loader.load("strange", str(out), validation)


def labels(part, most=100):
    """Return the labels of a split by the numbers of the images."""
    number_of = {pixels(number).tobytes(): number for number in range(most)}
    pairs = zip(np.asarray(part.images), part.labels, strict=True)
    return {number_of[image.tobytes()]: int(label) for image, label in pairs}


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("held_out", ["val", "valid", "dev", "validation", "Test", "eval"])
def test_held_out_splits_of_any_name_are_used(train, held_out, tmp_path):
    store(tmp_path, lambda f: {}, {train: rows(4), held_out: rows(2, 4), "extra": rows(1, 6)})
    data = load(tmp_path)
    assert sorted(labels(data.train)) == [0, 1, 2, 3]
    assert sorted(labels(data.test)) == [4, 5]
    assert "its splits extra are not used" in data.notes


def test_a_validation_and_a_test_split_are_both_used(tmp_path):
    splits = {"train": rows(4), "dev": rows(2, 4), "val": rows(2, 6), "test": rows(1, 8)}
    store(tmp_path, lambda f: {}, splits)
    data = load(tmp_path, None)
    parts = data.train, data.validation, data.test
    assert [sorted(labels(part)) for part in parts] == [[0, 1, 2, 3], [6, 7], [8]]
    assert "its splits dev are not used" in data.notes


def test_a_set_without_a_test_split_holds_out_every_tenth_example(tmp_path):
    store(tmp_path, lambda f: {"label": f.Text()}, {"train": rows(20, label=lambda i: "ab"[i % 2])})
    data = load(tmp_path)
    assert len(data.test.images) == 2
    assert all(label == i % 2 for i, label in (labels(data.train) | labels(data.test)).items())
    assert any("every tenth training example" in note for note in data.notes)


def test_labels_that_are_texts_become_classes(tmp_path):
    names = ["zebra", "ape", "", "mole é"]
    splits = {
        "train": rows(6, label=lambda i: names[i % 3]),
        "test": rows(2, 6, label=lambda i: names[i % 4]),
    }
    store(tmp_path, lambda f: {"label": f.Text()}, splits)
    data = load(tmp_path)
    assert data.classes == ("ape", "mole é", "zebra")
    assert labels(data.train) == {0: 2, 1: 0, 2: -1, 3: 2, 4: 0, 5: -1}
    assert labels(data.test) == {6: -1, 7: 1}


@pytest.mark.parametrize("numbers", [(3, 7, 10), (0, 1, 2), (5, -1, 10**9)])
def test_numbers_without_names_become_classes(numbers, tmp_path):
    def of(i):
        return numbers[i % 3]

    splits = {"train": rows(6, label=of), "test": rows(3, 6, label=of)}
    store(tmp_path, lambda f: {"label": f.Scalar(np.int64)}, splits)
    data = load(tmp_path)
    classes = sorted(set(numbers) - {-1})
    assert data.classes == tuple(map(str, classes))
    for i, label in (labels(data.train) | labels(data.test)).items():
        assert label == (-1 if of(i) == -1 else classes.index(of(i)))


@pytest.mark.parametrize(
    ("feature", "of"),
    [
        (lambda f: f.Sequence(f.ClassLabel(names=["a", "b"])), lambda i: [i % 2, 1]),
        (lambda f: f.Sequence(f.Text()), lambda i: ["a", "b"]),
        (lambda f: f.Scalar(np.float32), lambda i: i / 2),
        (lambda f: f.FeaturesDict({"name": f.Text()}), lambda i: {"name": "a"}),
    ],
)
def test_labels_that_are_not_classes_are_not_used_and_a_note_reports_it(feature, of, tmp_path):
    splits = {"train": rows(4, label=of), "test": rows(2, 4, label=of)}
    store(tmp_path, lambda f: {"label": feature(f)}, splits)
    data = load(tmp_path)
    assert data.classes == ()
    assert set(data.train.labels) == {-1}
    assert "its labels are not classes and are not used" in data.notes


def test_a_label_of_minus_one_stays_minus_one(tmp_path):
    splits = {"train": rows(4, label=lambda i: i % 3 - 1), "test": rows(2, 4, label=lambda i: 0)}
    store(tmp_path, lambda f: {"label": f.ClassLabel(names=["a", "b"])}, splits)
    data = load(tmp_path)
    assert data.classes == ("a", "b")
    assert labels(data.train) == {0: -1, 1: 0, 2: 1, 3: -1}


def test_the_first_caption_of_a_list_is_used_or_an_empty_one(tmp_path):
    def of(i):
        return [] if i == 2 else [f" image {i}\n", "another"]

    splits = {"train": rows(4, captions=of), "test": rows(2, 4, captions=of)}
    store(tmp_path, lambda f: {"captions": f.Sequence(f.Text())}, splits)
    data = load(tmp_path)
    assert sorted(untokenize(data.train.captions)) == ["", "image 0", "image 1", "image 3"]
    assert data.caption_length == 16


def test_a_set_whose_captions_are_all_empty_has_no_captions(tmp_path):
    splits = {"train": rows(4, text=lambda i: " "), "test": rows(2, 4, text=lambda i: "a")}
    store(tmp_path, lambda f: {"text": f.Text()}, splits)
    data = load(tmp_path)
    assert data.caption_length == 0
    assert any("all captions of the training images are empty" in note for note in data.notes)


def test_grey_images_become_rgb_if_others_are_rgb(tmp_path):
    grey = pixels(9, channels=1)
    examples = [{"image": encoded(Image.fromarray(grey[..., 0]))}, *rows(3)]
    store(tmp_path, lambda f: {}, {"train": examples, "test": rows(1, 4)})
    data = load(tmp_path)
    assert data.shape == (8, 8, 3)
    assert np.broadcast_to(grey, (8, 8, 3)).tobytes() in {i.tobytes() for i in data.train.images}


def test_images_of_two_sizes_are_an_error(tmp_path):
    store(tmp_path, lambda f: {}, {"train": [*rows(3), {"image": png(5, (8, 12))}]})
    with pytest.raises(UserError, match=r"different sizes \((8x8 and 12x8|12x8 and 8x8)\)"):
        load(tmp_path)


def test_an_invalid_set_is_an_error_of_one_line(tmp_path, launch_here):
    arguments = ("--config.data=strange", f"--data_dir={tmp_path}", "--workdir=run")
    examples = [*rows(3), {"image": png(5, (8, 12))}]
    store(tmp_path, lambda f: {}, {"train": examples, "test": rows(2)})
    result = launch_here("--experiment=vae_digits", "--debug", *arguments)
    expect_one_line(result, "data set strange contains images of different sizes")
    shutil.rmtree(tmp_path / "strange")
    examples = [{**row, "text": " "} for row in rows(4)]
    store(tmp_path, lambda f: {"text": f.Text()}, {"train": examples, "test": examples})
    result = launch_here("--experiment=text_encoder_shapes", "--debug", *arguments)
    expect_one_line(result, "data set strange has no captions, or only empty captions")


@pytest.mark.parametrize("names", [["test"], ["val", "extra"]])
def test_a_set_without_training_images_is_an_error(names, tmp_path):
    store(tmp_path, lambda f: {}, dict.fromkeys(names, rows(2)))
    with pytest.raises(UserError, match=f"has no train split, only {', '.join(names)}"):
        load(tmp_path)


def test_no_file_is_written_into_the_directory_of_the_records(tmp_path):
    store(tmp_path, lambda f: {}, {"train": rows(4), "test": rows(2)})
    before = sorted(tmp_path.rglob("*"))
    load(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
