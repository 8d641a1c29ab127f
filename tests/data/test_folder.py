"""Folders of images: splits, classes, links, skipped files, captions and the cache."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unicodedata

import numpy as np
import pytest

from ddpm_jax.data import cache, loader
from ddpm_jax.data.captions import lines_of, read_text
from ddpm_jax.data.tokenizer import untokenize
from ddpm_jax.errors import UserError
from helpers.data_sets import pixels, png, write
from helpers.launching import ROOT, user_environment


def images(folder, count, first=0):
    """Write `count` images with the numbers from `first` on."""
    for number in range(first, first + count):
        write(folder / f"{number:03d}.png", png(number))


def numbers(part, most=200):
    """Return the numbers of the images of a split, as `images` wrote them."""
    number_of = {pixels(number).tobytes(): number for number in range(most)}
    return [number_of[image.tobytes()] for image in np.asarray(part.images)]


def load(folder, validation=0):
    return loader.load(f"folder:{folder}", validation=validation)


def note(data, text):
    """Return the only note that begins with `text`."""
    (match,) = [note for note in data.notes if note.startswith(text)]
    return match


# Splits.


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize(
    "held_out", ["val", "Valid", "validation", "dev", "EVAL", "test", "Holdout"]
)
def test_held_out_folders_are_splits_in_any_case(train, held_out, tmp_path):
    images(tmp_path / train / "a", 6)
    images(tmp_path / held_out / "a", 3, 6)
    data = load(tmp_path)
    assert data.classes == ("a",)
    assert numbers(data.train) == [0, 1, 2, 3, 4, 5]
    assert numbers(data.test) == [6, 7, 8]


def test_a_single_folder_train_is_not_a_class_and_one_image_in_ten_is_held_out(tmp_path):
    for label in ("cat", "dog"):
        images(tmp_path / "train" / label, 40, 40 * (label == "dog"))
    images(tmp_path, 1, 90)
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert sorted(numbers(data.train) + numbers(data.test)) == list(range(80))
    assert 2 < len(data.test.images) < 20
    assert [data.classes[label] for label in data.train.labels] == [
        "dog" if number >= 40 else "cat" for number in numbers(data.train)
    ]
    assert "skipped 1 images outside of the folders of the splits" in data.notes
    without = tmp_path / "train" / "cat"
    os.rename(without, tmp_path / "moved")
    assert load(tmp_path / "moved").classes == ()


def test_a_class_may_be_called_train_among_others(tmp_path):
    for first, label in enumerate(("train", "bus", "car")):
        images(tmp_path / label, 4, 4 * first)
    assert load(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "val/a", "valid/a"], "2 folders of the validation split: valid, val"),
        (["train/a", "Train/a", "test/a"], "2 folders of the train split: Train, train"),
        (["test/a", "dev/a"], "has dev and test, but no folder train;"),
        (["a", "b", "val"], "has val, but no folder train;"),
        (["train/a", "extra/a"], "a folder train with class folders and also extra"),
        (["a/train", "a/test", "b/train"], "the splits train and test are in"),
        (["birds/train/a", "birds/Train/a"], "birds has 2 folders of the train split"),
        (["birds/test/a", "birds/b"], "birds has test, but no folder train;"),
    ],
)  # fmt: skip
def test_ambiguous_splits_are_refused(folders, message, tmp_path):
    for number, folder in enumerate(folders):
        images(tmp_path / folder, 3, 3 * number)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (["train2017", "val2017"], "train2017"),
        (["Training Set", "Test Set"], "Test Set"),
        (["train/a", "val2017/a"], "val2017"),
        (["train", "train-2"], "train-2"),
        (["train_images/a", "test_images/a"], "test_images"),
        (["trainA", "trainB", "testA"], "testA"),
        (["valid_64x64", "train_64x64"], "train_64x64"),
        (["coco/2017-train", "coco/2017-dev"], "2017-dev"),
        (["TRAINSET", "Evaluation.Data", "cat"], "Evaluation.Data"),
        (["train/a", "val/a", "test_tubes"], "test_tubes"),
    ],
)
def test_folders_with_names_like_splits_are_refused(folders, name, tmp_path):
    for number, folder in enumerate(folders):
        images(tmp_path / folder, 3, 3 * number)
    message = (
        f"/{name} would be a class, .* like that of a split; rename it to train, validation or test"
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "classes",
    [
        ["cat", "test_tubes"],
        ["flask", "train2017"],
        ["train_interior", "train_railway"],
        ["blood_test", "toy_train"],
        ["testers", "trainers"],
        ["bus", "train"],
        ["devils", "values"],
    ],
)
def test_classes_may_have_names_that_begin_like_those_of_splits(classes, tmp_path):
    for number, folder in enumerate(classes):
        images(tmp_path / folder, 3, 3 * number)
    assert load(tmp_path).classes == tuple(classes)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("images", ""), ("a/b", ""), ("dataset", "train"), ("", "train"), ("data", "train/images")],
)
def test_classes_are_read_from_inside_a_single_folder(outer, inner, tmp_path):
    root = tmp_path / "root"
    for number, label in enumerate(("cat", "dog")):
        images(root / outer / inner / label, 20, 20 * number)
        if inner:
            held_out = inner.replace("train", "val")
            images(root / outer / held_out / label, 5, 100 + 5 * number)
    (root / outer / "about.md").write_text("about these images")
    data = load(root)
    assert data.classes == ("cat", "dog")
    assert [numbers(data.train)[row] >= 20 for row in range(len(data.train.labels))] == [
        label == 1 for label in data.train.labels
    ]
    passed = "/".join(filter(None, [outer, "SPLIT/images" if "/" in inner else ""]))
    message = f"splits and classes are read from inside {passed}, which is the only folder"
    assert (message in data.notes) == bool(passed)
    if inner:
        assert numbers(data.test) == list(range(100, 110))
    (tmp_path / "direct").symlink_to(root / outer)
    direct = load(tmp_path / "direct")
    assert direct.fingerprint == data.fingerprint


def test_a_single_folder_of_images_is_a_class(tmp_path):
    images(tmp_path / "cat", 4)
    images(tmp_path / "cat" / "more", 4, 4)
    images(tmp_path, 2, 8)
    assert load(tmp_path).classes == ("cat",)


def test_images_outside_of_class_folders_have_no_class_and_are_counted(tmp_path):
    images(tmp_path / "train" / "a", 3)
    images(tmp_path / "train", 2, 3)
    images(tmp_path / "test" / "a", 2, 5)
    data = load(tmp_path)
    assert dict(zip(numbers(data.train), data.train.labels, strict=True)) == {
        0: 0, 1: 0, 2: 0, 3: -1, 4: -1,
    }  # fmt: skip
    assert "2 of 7 images are in no class folder and have no class" in data.notes


# Files and folders that are not read.


def test_classes_without_training_images_are_named(tmp_path):
    for path in ("train/Cat/0.png", "train/Dog/1.png", "test/cat/2.png"):
        write(tmp_path / path, png())
    assert any("1 classes have no training images: cat" in note for note in load(tmp_path).notes)


def test_the_first_caption_key_with_a_text_is_used(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.png", png(number))
    lines = [{"file_name": f"{n}.png", "text": "", "caption": f"number {n}"} for n in range(3)]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)).encode())
    data = load(tmp_path)
    texts = [*untokenize(data.train.captions), *untokenize(data.test.captions)]
    assert sorted(texts) == ["number 0", "number 1", "number 2"]


def test_files_and_folders_of_other_programs_are_skipped(tmp_path):
    images(tmp_path / "a", 5)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "#recycle", ".thumbnails"):
        images(tmp_path / name, 2, 50)
        images(tmp_path / "a" / name, 2, 50)
        (tmp_path / "a" / name / "metadata.jsonl").write_text("no JSON")
    for name in ("._000.png", ".hidden.jpg", "._000.txt"):
        write(tmp_path / "a" / name, png(60))
    data = load(tmp_path)
    assert data.classes == ("a",)
    assert sorted(numbers(data.train) + numbers(data.test)) == [0, 1, 2, 3, 4]
    assert not data.notes


def test_files_with_other_endings_are_counted(tmp_path):
    images(tmp_path, 4)
    names = ["a.heic", "b.HEIC", "c.ppm", "README", "Thumbs.db", ".hidden.heic", "a.txt", "d.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    data = load(tmp_path)
    assert "skipped 4 files with other endings: .heic (2), .ppm (1), no ending (1)" in data.notes
    assert note(data, "skipped 1 tables, such as d.jsonl: captions are only read from metadata")
    (tmp_path / "e.ppm").touch()
    again = load(tmp_path)
    assert "skipped 5 files with other endings: .heic (2), .ppm (2), no ending (1)" in again.notes
    assert not any(text.startswith("the images were decoded again") for text in again.notes)


@pytest.mark.parametrize("names", [["a.heic", "b/c.avif"], ["a.ppm"], ["a.svg", "a.txt"]])
def test_a_folder_that_only_has_other_endings_is_refused_with_their_names(names, tmp_path):
    for name in names:
        write(tmp_path / name, png())
    with pytest.raises(UserError, match=f"no images in .*other endings: .*\\{names[0][1:]}"):
        load(tmp_path)


def test_a_hidden_folder_that_the_user_gives_is_read(tmp_path):
    images(tmp_path / ".images", 5)
    assert len(load(tmp_path / ".images").train.images) == 4


def test_each_linked_folder_is_read_once_and_a_cycle_is_reported(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    images(root / "z", 4)
    images(outside / "inner", 4, 4)
    (outside / "inner" / "back").symlink_to(outside)
    (root / "a").symlink_to("z")  # the folder is read as z, not by the link
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(outside / "inner")
    (root / "z" / "loop").symlink_to(root)
    (root / "self").symlink_to(".")
    (root / "up").symlink_to(tmp_path)
    (root / "broken").symlink_to("nowhere")
    data = load(root)
    assert data.classes == ("again", "z")
    assert sorted(numbers(data.train) + numbers(data.test)) == list(range(8))
    text = "\n".join(data.notes)
    for name in ("z/loop", "self", "up", "again/back"):
        assert f"{name}: it is" in text
    assert f"skipped the folder {root / 'a'}: it is {root / 'z'}, which was read" in text
    assert f"skipped the folder {root / 'linked' / 'inner'}: it is " in text


def test_names_that_are_not_files_are_reported_and_pipes_do_not_block(tmp_path):
    images(tmp_path, 5)
    for name in ("pipe.png", "000.txt", "metadata.jsonl", "metadata.csv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    images(tmp_path / "folder.png", 1, 5)
    data = load(tmp_path)
    assert sorted(numbers(data.train) + numbers(data.test)) == list(range(6))
    skipped = note(data, "skipped 6 paths that are not files")
    assert "broken.png (No such file or directory)" in skipped
    assert "000.txt (not a regular file)" in skipped


UNREADABLE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ddpm_jax.data import loader
loader.load("folder:" + sys.argv[2] + "/other")  # import all modules while their files may be read
if os.geteuid() == 0:
    os.setuid(65534)
data = loader.load("folder:" + sys.argv[2] + "/images", validation=0)
print(len(data.train.images) + len(data.test.images), *data.notes, sep="\\n")
"""


def test_folders_and_files_without_read_permission_are_reported():
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        root.chmod(0o777)
        images(root / "other", 4)
        images(root / "images" / "a", 5)
        images(root / "images" / "locked", 2, 5)
        (root / "images" / "a" / "000.png").chmod(0)
        (root / "images" / "locked").chmod(0)
        result = subprocess.run(
            [sys.executable, "-c", UNREADABLE, ROOT, directory], capture_output=True, text=True,
            env=user_environment(XDG_CACHE_HOME=f"{directory}/cache"), timeout=60,
        )  # fmt: skip
        (root / "images" / "locked").chmod(0o755)
    assert result.returncode == 0, result.stderr
    count, *notes = result.stdout.splitlines()
    assert count == "4"
    assert f"cannot read the folder {root / 'images' / 'locked'}: Permission denied" in notes
    assert "skipped 1 corrupt of 5 images: a/000.png (Permission denied)" in notes


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xe9"
    os.mkdir(folder)
    for number in range(4):
        with open(folder + b"/%d\xe9.png" % number, "wb") as file:
            file.write(png(number))
    data = load(tmp_path)
    assert len(data.classes) == 1
    assert load(pathlib.Path(os.fsdecode(folder))).title == r"folder \udcff\udce9"
    json.dumps(data.describe()).encode()


# Captions.


def captions(folder, validation=0):
    """Return the captions by the numbers of their images, and the data set."""
    data = load(folder, validation)
    actual = {}
    for part in (data.train, data.test):
        actual |= dict(zip(numbers(part), untokenize(part.captions), strict=True))
    return actual, data


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "METADATA.JSONL"])
def test_all_caption_keys_of_metadata_are_read(key, table, tmp_path):
    images(tmp_path / "sub", 4)
    path = tmp_path / "sub" / table
    if table.endswith("csv"):
        rows = "".join(f'{i:03d}.png,5,"image, ""{i}"""\r\n' for i in range(4))
        path.write_text(f"file_name,other,{key}\r\n{rows}")
    else:
        lines(path, [{"file_name": f"{i:03d}.png", key: f'image, "{i}"'} for i in range(4)])
    assert captions(tmp_path)[0] == {i: f'image, "{i}"' for i in range(4)}


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        (
            "metadata.jsonl", '{"file_name": "000.png", "texts": "a"}',
            "line 1: .*it has file_name, texts",
        ),
        ("metadata.jsonl", '\n{"image": "000.png", "text": "a"}', "line 2: .*it has image, text"),
        ("metadata.jsonl", "{}", "line 1: .*it has no keys"),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": 5}',
            "line 1: text must be a string, not 5",
        ),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": null}',
            "text must be a string, not null",
        ),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": []}',
            r"text must be a string, not \[\]",
        ),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": {"a": 1}}',
            "text must be a string, not",
        ),
        (
            "metadata.jsonl", '{"file_name": ["000.png"], "text": "a"}',
            "file_name must be a string, not",
        ),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "a"}\n[1]', "line 2: every line must"),
        ("metadata.jsonl", "[" * 100_000, "line 1: every line must be"),
        ("metadata.jsonl", '{"file_name": "000.png" "text": "a"}', "line 1: every line must be"),
        ("metadata.jsonl", '{"file_name": "../000.png", "text": "a"}', r"file_name .*outside of"),
        (
            "metadata.jsonl", '{"file_name": "/etc/passwd", "text": "a"}',
            r"file_name .*outside of",
        ),
        (
            "metadata.jsonl", '{"file_name": "..\\\\..\\\\a.png", "text": "a"}',
            r"file_name .*is outside",
        ),
        (
            "metadata.jsonl", '{"file_name": "9.png", "text": "a"}',
            "names no image of the folder .*9.png",
        ),
        ("metadata.csv", "file_name,label\n000.png,a\n", "line 2: .*it has file_name, label"),
        ("metadata.csv", "image,text\n000.png,a\n", "it has image, text"),
        ("metadata.csv", "file_name,text\n000.png\n", "line 2: text must be a string, not null"),
        ("metadata.csv", 'file_name,text\n000.png,"a', "line 1: unexpected end of data"),
        ("metadata.csv", "file_name,text\n000.png," + "a" * 200_000, "field larger than"),
        ("metadata.jsonl", b"\xff\xfe{\0", "cannot be read as UTF-8 text"),
        ("000.txt", b"\xe9t\xe9", "000.txt cannot be read as UTF-8 text"),
    ],
)  # fmt: skip
def test_invalid_metadata_is_an_error_that_names_the_line(table, content, message, tmp_path):
    images(tmp_path, 4)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / table).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_the_first_of_several_captions_is_used_and_the_others_are_counted(tmp_path):
    images(tmp_path, 4)
    rows = [
        {"file_name": "000.png", "text": ["first", "second"]},
        {"file_name": "001.png", "caption": "another key", "text": "the first key"},
        {"file_name": "002.png", "text": "first"},
        {"file_name": "002.png", "text": "later"},
    ]
    lines(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "001.txt").write_text("text file")
    (tmp_path / "003.txt").write_text("text file")
    actual, data = captions(tmp_path)
    assert actual == {0: "first", 1: "the first key", 2: "first", 3: "text file"}
    assert note(data, "2 captions are not used, because their images have another caption")


def test_captions_without_an_image_are_counted(tmp_path):
    images(tmp_path, 4)
    rows = [{"file_name": f"{i:03d}.png", "text": f"image {i}"} for i in range(6)]
    lines(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "000.txt").write_text("")
    (tmp_path / "readme.txt").write_text("about these images")
    actual, data = captions(tmp_path)
    assert actual == {i: f"image {i}" for i in range(4)}
    assert note(data, "2 captions name images that do not exist (metadata.jsonl line 5: 004.png)")
    assert note(data, "1 .txt files have no image of the same name (readme.txt)")


@pytest.mark.parametrize("names", [["readme.txt"], ["4.txt", "sub/000.txt"]])
def test_text_files_without_images_are_counted(names, tmp_path):
    images(tmp_path, 4)
    for name in names:
        write(tmp_path / name, b"a caption")
    data = load(tmp_path)
    assert data.train.captions is None
    assert note(data, f"{len(names)} .txt files have no image of the same name ({names[0]})")


@pytest.mark.parametrize("forms", ["NFC NFD", "NFD NFC", "NFD NFD"])
@pytest.mark.parametrize("table", [None, "metadata.jsonl", "metadata.csv"])
def test_names_match_in_either_unicode_form(forms, table, tmp_path):
    names = [
        [unicodedata.normalize(form, name) for name in ("caf\u00e9", "\ud55c\uae00", "\u00c5")]
        for form in forms.split()
    ]
    for number, name in enumerate(names[0]):
        write(tmp_path / f"{name}.png", png(number))
    rows = [{"file_name": f"{name}.png", "text": f"{n}"} for n, name in enumerate(names[1])]
    if table is None:
        for number, name in enumerate(names[1]):
            (tmp_path / f"{name}{'.png' * (number == 1)}.txt").write_text(f"{number}")
    elif table.endswith(".csv"):
        lines_of_table = [f"{row['file_name']},{row['text']}\n" for row in rows]
        (tmp_path / table).write_text("file_name,text\n" + "".join(lines_of_table))
    else:
        lines(tmp_path / table, rows)
    assert captions(tmp_path)[0] == {0: "0", 1: "1", 2: "2"}


def test_images_whose_names_only_differ_in_unicode_form_have_their_own_captions(tmp_path):
    for number, form in enumerate(("NFC", "NFD")):
        name = unicodedata.normalize(form, "caf\u00e9")
        write(tmp_path / f"{name}.png", png(number))
        (tmp_path / f"{name}.txt").write_text(form)
    images(tmp_path, 2, 2)
    actual, data = captions(tmp_path)
    assert (actual[0], actual[1]) == ("NFC", "NFD")
    assert not any("captions are not used" in text for text in data.notes)


def test_two_text_files_of_one_image_are_counted(tmp_path):
    images(tmp_path, 4)
    for name in ("000.txt", "000.png.txt", "001.txt", "001.TXT", "003.png.txt"):
        (tmp_path / name).write_text(name)
    write(tmp_path / "003.jpg", png(4))
    (tmp_path / "003.txt").write_text("of the stem")
    actual, data = captions(tmp_path)
    assert actual[0] == "000.png.txt"
    assert actual[1] == "001.TXT"
    assert (actual[3], actual[4]) == ("003.png.txt", "of the stem")
    assert note(data, "3 captions are not used, because their images have another caption")


def test_paths_in_metadata_may_have_backslashes_and_folders(tmp_path):
    images(tmp_path / "sub" / "deep", 2)
    images(tmp_path / "sub", 1, 2)
    images(tmp_path, 1, 3)
    rows = [
        {"file_name": "deep\\000.png", "text": "zero"},
        {"file_name": "./deep/../deep/001.png", "text": "one"},
        {"file_name": "002.png", "text": "two"},
        {"file_name": "../003.png", "text": "three"},
    ]
    lines(tmp_path / "sub" / "metadata.jsonl", rows)
    assert captions(tmp_path)[0] == {0: "zero", 1: "one", 2: "two", 3: "three"}


def test_text_files_may_have_any_case_and_several_images(tmp_path):
    images(tmp_path, 4)
    (tmp_path / "002.png").rename(tmp_path / "006.png")
    (tmp_path / "003.png").rename(tmp_path / "006.PNG")
    (tmp_path / "000.TXT").write_text("zero")
    (tmp_path / "001.png.txt").write_text("one")
    (tmp_path / "006.txt").write_text("both")
    assert captions(tmp_path)[0] == {0: "zero", 1: "one", 2: "both", 3: "both"}


@pytest.mark.parametrize("where", ["000.txt", "metadata.jsonl", "metadata.csv"])
def test_a_byte_order_mark_is_removed_and_other_separators_do_not_end_a_line(where, tmp_path):
    text = "a\u2028b\x85c\x0bd\x1ce"
    images(tmp_path, 4)
    content = {
        "000.txt": text,
        "metadata.jsonl": json.dumps({"file_name": "000.png", "text": text}, ensure_ascii=False)
        + '\r\n{"file_name": "001.png", "text": "b"}\r\n',
        "metadata.csv": f"file_name,text\n000.png,{text}\n001.png,b\n",
    }[where]
    (tmp_path / where).write_bytes(b"\xef\xbb\xbf" + content.encode())
    for number in (0, 1, 2, 3):
        if where == "000.txt" and number:
            (tmp_path / f"{number:03d}.txt").write_text("b")
    actual, _ = captions(tmp_path)
    assert actual[0] == text
    assert actual[1] == "b"


@pytest.mark.parametrize("empty", ["", " \n", "\ufeff", "\u2028"])
def test_a_set_whose_captions_are_all_empty_has_no_captions(empty, tmp_path):
    images(tmp_path, 6)
    for number in range(6):
        (tmp_path / f"{number:03d}.txt").write_text(empty, encoding="utf-8")
    data = load(tmp_path)
    assert data.train.captions is None
    assert data.caption_length == 0
    assert note(data, "all captions of the training images are empty")


def test_a_note_reports_captions_that_are_all_the_same(tmp_path):
    images(tmp_path, 6)
    for number in range(6):
        (tmp_path / f"{number:03d}.txt").write_text("an image")
    assert note(load(tmp_path), "all training images have the same caption")


def test_only_line_feeds_end_lines(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffa\u2028b\r\nc\x85d\n\ne\x0c".encode())
    assert lines_of(read_text(tmp_path / "a")) == ["a\u2028b", "c\x85d", "", "e\x0c"]


# The cache.


def damages(directory):
    """Return functions that damage a cached data set whose files can still be read."""
    train = {n: np.load(directory / f"train_{n}.npy") for n in ("images", "labels", "captions")}
    meta = json.loads((directory / "meta.json").read_text())
    forms = meta["forms"]["train"]

    def with_array(position, name, array):
        def save():
            np.save(directory / f"train_{name}.npy", array)
            forms[position] = [list(array.shape), str(array.dtype)]
            (directory / "meta.json").write_text(json.dumps(meta))

        return save

    def with_meta(**values):
        return lambda: (directory / "meta.json").write_text(json.dumps(meta | values))

    return {
        "fewer labels": with_array(1, "labels", train["labels"][1:]),
        "labels of another type": with_array(1, "labels", train["labels"].astype(np.int64)),
        "labels that are not classes": with_array(1, "labels", train["labels"] + 1),
        "longer captions": with_array(2, "captions", np.pad(train["captions"], ((0, 0), (0, 1)))),
        "fewer captions": with_array(2, "captions", train["captions"][1:]),
        "images of another type": with_array(0, "images", train["images"].astype(np.float32)),
        "images of another size": with_array(0, "images", train["images"][:, 1:]),
        "invalid forms": with_meta(forms=[1, 2]),
        "no forms": with_meta(forms={}),
        "forms of another split": with_meta(forms={**meta["forms"], "../x": forms}),
        "classes that are numbers": with_meta(classes=[1]),
        "a number for notes": with_meta(notes=3),
        "levels": with_meta(levels="many"),
        "a list": lambda: (directory / "meta.json").write_text("[]"),
        "deep nesting": lambda: (directory / "meta.json").write_text("[" * 100_000),
    }


@pytest.mark.parametrize("damage", range(15))
def test_a_damaged_cache_is_decoded_again(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    images(root / "a", 6)
    for number in range(6):
        (root / "a" / f"{number:03d}.txt").write_text(f"image {number}")
    first, _ = captions(root)
    (meta,) = cache.cache_dir().glob("decoded/*/meta.json")
    list(damages(meta.parent).values())[damage]()
    actual, data = captions(root)
    assert actual == first
    assert note(data, "the images were decoded again, ")
    assert not captions(root)[1].notes


def test_no_file_is_written_into_the_folder_of_images(tmp_path):
    images(tmp_path, 4)
    before = sorted(tmp_path.rglob("*"))
    load(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
