"""Folders of the user's own images: splits, classes, links, what is skipped, captions."""

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
    """Write so many images, of numbers from `first` on."""
    for number in range(first, first + count):
        write(folder / f"{number:03d}.png", png(number))


def numbers(part, most=200):
    """The numbers of a split's images, as `images` wrote them."""
    known = {pixels(number).tobytes(): number for number in range(most)}
    return [known[image.tobytes()] for image in np.asarray(part.images)]


def load(folder, validation=0):
    return loader.load(f"folder:{folder}", validation=validation)


def note(data, text):
    """The one note that begins with a text."""
    (found,) = [some for some in data.notes if some.startswith(text)]
    return found


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


def test_a_folder_train_alone_is_no_class_and_one_image_in_ten_is_held_out(tmp_path):
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
    assert "left out 1 images outside the folders of its splits" in data.notes
    without = tmp_path / "train" / "cat"
    os.rename(without, tmp_path / "moved")
    assert load(tmp_path / "moved").classes == ()


def test_a_class_may_be_called_train_among_others(tmp_path):
    for first, label in enumerate(("train", "bus", "car")):
        images(tmp_path / label, 4, 4 * first)
    assert load(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (["train/a", "val/a", "valid/a"], "2 folders of the validation split: valid, val"),
        (["train/a", "Train/a", "test/a"], "2 folders of the train split: Train, train"),
        (["test/a", "dev/a"], "has dev and test, but no folder train beside"),
        (["a", "b", "val"], "has val, but no folder train beside"),
        (["train/a", "extra/a"], "a folder train with classes of its own beside extra"),
        (["a/train", "a/test", "b/train"], "the splits train and test lie in"),
        (["birds/train/a", "birds/Train/a"], "birds has 2 folders of the train split"),
        (["birds/test/a", "birds/b"], "birds has test, but no folder train beside"),
    ],
)  # fmt: skip
def test_splits_that_are_not_clear_are_refused(folders, says, tmp_path):
    for number, folder in enumerate(folders):
        images(tmp_path / folder, 3, 3 * number)
    with pytest.raises(UserError, match=says):
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
def test_folders_that_are_called_like_splits_are_refused(folders, name, tmp_path):
    for number, folder in enumerate(folders):
        images(tmp_path / folder, 3, 3 * number)
    says = f"/{name} is called like a split .* rename .* to train, validation and test"
    with pytest.raises(UserError, match=says):
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
def test_classes_may_have_names_that_begin_like_splits(classes, tmp_path):
    for number, folder in enumerate(classes):
        images(tmp_path / folder, 3, 3 * number)
    assert load(tmp_path).classes == tuple(classes)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("images", ""), ("a/b", ""), ("dataset", "train"), ("", "train"), ("data", "train/images")],
)
def test_a_folder_above_the_classes_is_passed(outer, inner, tmp_path):
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
    passed = "/".join(filter(None, [outer, "each split's/images" if "/" in inner else ""]))
    says = f"{passed} is the only folder: splits and classes are read from within it"
    assert (says in data.notes) == bool(passed)
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


def test_images_beside_class_folders_have_no_class_and_are_counted(tmp_path):
    images(tmp_path / "train" / "a", 3)
    images(tmp_path / "train", 2, 3)
    images(tmp_path / "test" / "a", 2, 5)
    data = load(tmp_path)
    assert dict(zip(numbers(data.train), data.train.labels, strict=True)) == {
        0: 0, 1: 0, 2: 0, 3: -1, 4: -1,
    }  # fmt: skip
    assert "2 of 7 images lie beside the class folders: no class" in data.notes


# What is not read.


def test_classes_without_training_images_are_named(tmp_path):
    for path in ("train/Cat/0.png", "train/Dog/1.png", "test/cat/2.png"):
        write(tmp_path / path, png())
    assert any("1 classes have no training images: cat" in note for note in load(tmp_path).notes)


def test_of_several_keys_the_first_with_a_text_is_used(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.png", png(number))
    lines = [{"file_name": f"{n}.png", "text": "", "caption": f"number {n}"} for n in range(3)]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)).encode())
    found = load(tmp_path)
    texts = [*untokenize(found.train.captions), *untokenize(found.test.captions)]
    assert sorted(texts) == ["number 0", "number 1", "number 2"]


def test_what_programs_leave_behind_is_skipped(tmp_path):
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


def test_files_of_other_endings_are_counted(tmp_path):
    images(tmp_path, 4)
    names = ["a.heic", "b.HEIC", "c.ppm", "README", "Thumbs.db", ".hidden.heic", "a.txt", "d.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    data = load(tmp_path)
    assert "left out 4 files of other endings: .heic (2), .ppm (1), no ending (1)" in data.notes
    assert note(data, "1 tables are not read, such as d.jsonl: captions are read from metadata")
    (tmp_path / "e.ppm").touch()
    again = load(tmp_path)
    assert "left out 5 files of other endings: .heic (2), .ppm (2), no ending (1)" in again.notes
    assert not any(text.startswith("decoded again") for text in again.notes)


@pytest.mark.parametrize("names", [["a.heic", "b/c.avif"], ["a.ppm"], ["a.svg", "a.txt"]])
def test_a_folder_of_other_endings_alone_is_refused_with_their_names(names, tmp_path):
    for name in names:
        write(tmp_path / name, png())
    with pytest.raises(UserError, match=f"no images in .*other endings: .*\\{names[0][1:]}"):
        load(tmp_path)


def test_a_folder_that_is_hidden_itself_is_read(tmp_path):
    images(tmp_path / ".images", 5)
    assert len(load(tmp_path / ".images").train.images) == 4


def test_each_linked_folder_is_read_once_and_a_cycle_is_reported(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    images(root / "z", 4)
    images(outside / "inner", 4, 4)
    (outside / "inner" / "back").symlink_to(outside)
    (root / "a").symlink_to("z")  # the folder's own name is kept
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
        assert f"{name} is not read: it leads to" in text or f"{name} is not read again" in text
    assert f"the folder {root / 'a'} is not read again" in text
    assert f"{root / 'linked' / 'inner'} is not read again" in text


def test_names_that_are_no_files_are_named_and_nothing_waits_for_a_pipe(tmp_path):
    images(tmp_path, 5)
    for name in ("pipe.png", "000.txt", "metadata.jsonl", "metadata.csv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    images(tmp_path / "folder.png", 1, 5)
    data = load(tmp_path)
    assert sorted(numbers(data.train) + numbers(data.test)) == list(range(6))
    found = note(data, "skipped 6 names that are not files")
    assert "broken.png (No such file or directory)" in found
    assert "000.txt (not a regular file)" in found


UNREADABLE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ddpm_jax.data import loader
loader.load("folder:" + sys.argv[2] + "/other")  # whatever is imported, while it may be read
if os.geteuid() == 0:
    os.setuid(65534)
data = loader.load("folder:" + sys.argv[2] + "/images", validation=0)
print(len(data.train.images) + len(data.test.images), *data.notes, sep="\\n")
"""


def test_folders_and_files_that_may_not_be_read_are_named():
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        root.chmod(0o777)
        images(root / "other", 4)
        images(root / "images" / "a", 5)
        images(root / "images" / "locked", 2, 5)
        (root / "images" / "a" / "000.png").chmod(0)
        (root / "images" / "locked").chmod(0)
        found = subprocess.run(
            [sys.executable, "-c", UNREADABLE, ROOT, place], capture_output=True, text=True,
            env=user_environment(XDG_CACHE_HOME=f"{place}/cache"), timeout=60,
        )  # fmt: skip
        (root / "images" / "locked").chmod(0o755)
    assert found.returncode == 0, found.stderr
    count, *notes = found.stdout.splitlines()
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
    """Captions by the numbers of images, and the data."""
    data = load(folder, validation)
    found = {}
    for part in (data.train, data.test):
        found |= dict(zip(numbers(part), untokenize(part.captions), strict=True))
    return found, data


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "METADATA.JSONL"])
def test_the_known_keys_of_metadata_are_read(key, table, tmp_path):
    images(tmp_path / "sub", 4)
    path = tmp_path / "sub" / table
    if table.endswith("csv"):
        rows = "".join(f'{i:03d}.png,5,"image, ""{i}"""\r\n' for i in range(4))
        path.write_text(f"file_name,other,{key}\r\n{rows}")
    else:
        lines(path, [{"file_name": f"{i:03d}.png", key: f'image, "{i}"'} for i in range(4)])
    assert captions(tmp_path)[0] == {i: f'image, "{i}"' for i in range(4)}


@pytest.mark.parametrize(
    ("table", "content", "says"),
    [
        (
            "metadata.jsonl", '{"file_name": "000.png", "texts": "a"}',
            "line 1: .*it has file_name, texts",
        ),
        ("metadata.jsonl", '\n{"image": "000.png", "text": "a"}', "line 2: .*it has image, text"),
        ("metadata.jsonl", "{}", "line 1: .*it has nothing"),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": 5}',
            "line 1: text must be a text, not 5",
        ),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": null}',
            "text must be a text, not null",
        ),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": []}',
            r"text must be a text, not \[\]",
        ),
        (
            "metadata.jsonl", '{"file_name": "000.png", "text": {"a": 1}}',
            "text must be a text, not",
        ),
        (
            "metadata.jsonl", '{"file_name": ["000.png"], "text": "a"}',
            "file_name must be a text, not",
        ),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "a"}\n[1]', "line 2: must be"),
        ("metadata.jsonl", "[" * 100_000, "line 1: must be"),
        ("metadata.jsonl", '{"file_name": "000.png" "text": "a"}', "line 1: must be"),
        ("metadata.jsonl", '{"file_name": "../000.png", "text": "a"}', r"file_name .*leads out of"),
        (
            "metadata.jsonl", '{"file_name": "/etc/passwd", "text": "a"}',
            r"file_name .*leads out of",
        ),
        (
            "metadata.jsonl", '{"file_name": "..\\\\..\\\\a.png", "text": "a"}',
            r"file_name .*leads out",
        ),
        (
            "metadata.jsonl", '{"file_name": "9.png", "text": "a"}',
            "names no image of the folder .*9.png",
        ),
        ("metadata.csv", "file_name,label\n000.png,a\n", "line 2: .*it has file_name, label"),
        ("metadata.csv", "image,text\n000.png,a\n", "it has image, text"),
        ("metadata.csv", "file_name,text\n000.png\n", "line 2: text must be a text, not null"),
        ("metadata.csv", 'file_name,text\n000.png,"a', "line 1: unexpected end of data"),
        ("metadata.csv", "file_name,text\n000.png," + "a" * 200_000, "field larger than"),
        ("metadata.jsonl", b"\xff\xfe{\0", "cannot be read as text in UTF-8"),
        ("000.txt", b"\xe9t\xe9", "000.txt cannot be read as text in UTF-8"),
    ],
)  # fmt: skip
def test_metadata_that_is_not_as_it_must_be_is_named(table, content, says, tmp_path):
    images(tmp_path, 4)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / table).write_bytes(content)
    with pytest.raises(UserError, match=says):
        load(tmp_path)


def test_of_several_captions_the_first_is_used_and_the_rest_counted(tmp_path):
    images(tmp_path, 4)
    rows = [
        {"file_name": "000.png", "text": ["first", "second"]},
        {"file_name": "001.png", "caption": "another key", "text": "the first key"},
        {"file_name": "002.png", "text": "first"},
        {"file_name": "002.png", "text": "later"},
    ]
    lines(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "001.txt").write_text("of a text file")
    (tmp_path / "003.txt").write_text("of a text file")
    found, data = captions(tmp_path)
    assert found == {0: "first", 1: "the first key", 2: "first", 3: "of a text file"}
    assert note(data, "2 further captions of images that have one are not used")


def test_captions_of_no_image_are_counted(tmp_path):
    images(tmp_path, 4)
    rows = [{"file_name": f"{i:03d}.png", "text": f"image {i}"} for i in range(6)]
    lines(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "000.txt").write_text("")
    (tmp_path / "readme.txt").write_text("about these images")
    found, data = captions(tmp_path)
    assert found == {i: f"image {i}" for i in range(4)}
    assert note(data, "2 captions are of no image that is there (metadata.jsonl line 5: 004.png)")
    assert note(data, "1 .txt files belong to no image (readme.txt)")


@pytest.mark.parametrize("names", [["readme.txt"], ["4.txt", "sub/000.txt"]])
def test_text_files_that_all_belong_to_no_image_are_counted(names, tmp_path):
    images(tmp_path, 4)
    for name in names:
        write(tmp_path / name, b"a caption")
    data = load(tmp_path)
    assert data.train.captions is None
    assert note(data, f"{len(names)} .txt files belong to no image ({names[0]})")


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


def test_images_whose_names_differ_in_unicode_form_alone_keep_their_captions(tmp_path):
    for number, form in enumerate(("NFC", "NFD")):
        name = unicodedata.normalize(form, "caf\u00e9")
        write(tmp_path / f"{name}.png", png(number))
        (tmp_path / f"{name}.txt").write_text(form)
    images(tmp_path, 2, 2)
    found, data = captions(tmp_path)
    assert (found[0], found[1]) == ("NFC", "NFD")
    assert not any("further captions" in text for text in data.notes)


def test_two_text_files_of_one_image_are_counted(tmp_path):
    images(tmp_path, 4)
    for name in ("000.txt", "000.png.txt", "001.txt", "001.TXT", "003.png.txt"):
        (tmp_path / name).write_text(name)
    write(tmp_path / "003.jpg", png(4))
    (tmp_path / "003.txt").write_text("of the other")
    found, data = captions(tmp_path)
    assert found[0] == "000.png.txt"
    assert found[1] == "001.TXT"
    assert (found[3], found[4]) == ("003.png.txt", "of the other")
    assert note(data, "3 further captions of images that have one are not used")


def test_paths_in_metadata_may_have_backslashes_and_lead_down(tmp_path):
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


def test_text_files_of_any_case_and_images_that_share_one(tmp_path):
    images(tmp_path, 4)
    (tmp_path / "002.png").rename(tmp_path / "006.png")
    (tmp_path / "003.png").rename(tmp_path / "006.PNG")
    (tmp_path / "000.TXT").write_text("zero")
    (tmp_path / "001.png.txt").write_text("one")
    (tmp_path / "006.txt").write_text("both")
    assert captions(tmp_path)[0] == {0: "zero", 1: "one", 2: "both", 3: "both"}


@pytest.mark.parametrize("where", ["000.txt", "metadata.jsonl", "metadata.csv"])
def test_a_byte_order_mark_and_other_line_separators_belong_to_no_line_end(where, tmp_path):
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
    found, _ = captions(tmp_path)
    assert found[0] == text
    assert found[1] == "b"


@pytest.mark.parametrize("empty", ["", " \n", "\ufeff", "\u2028"])
def test_captions_that_are_all_empty_are_none(empty, tmp_path):
    images(tmp_path, 6)
    for number in range(6):
        (tmp_path / f"{number:03d}.txt").write_text(empty, encoding="utf-8")
    data = load(tmp_path)
    assert data.train.captions is None
    assert data.caption_length == 0
    assert note(data, "all captions of the training images are empty")


def test_captions_that_are_all_the_same_are_logged(tmp_path):
    images(tmp_path, 6)
    for number in range(6):
        (tmp_path / f"{number:03d}.txt").write_text("a picture")
    assert note(load(tmp_path), "all training images have the same caption")


def test_lines_end_at_one_character_only(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffa\u2028b\r\nc\x85d\n\ne\x0c".encode())
    assert lines_of(read_text(tmp_path / "a")) == ["a\u2028b", "c\x85d", "", "e\x0c"]


# The decoded copy.


def broken(place):
    """Ways in which the decoded arrays can disagree while each of them can be read."""
    train = {n: np.load(place / f"train_{n}.npy") for n in ("images", "labels", "captions")}
    meta = json.loads((place / "meta.json").read_text())
    forms = meta["forms"]["train"]

    def saved(position, name, array):
        def save():
            np.save(place / f"train_{name}.npy", array)
            forms[position] = [list(array.shape), str(array.dtype)]
            (place / "meta.json").write_text(json.dumps(meta))

        return save

    def said(**values):
        return lambda: (place / "meta.json").write_text(json.dumps(meta | values))

    return {
        "fewer labels": saved(1, "labels", train["labels"][1:]),
        "labels of another type": saved(1, "labels", train["labels"].astype(np.int64)),
        "labels that are not classes": saved(1, "labels", train["labels"] + 1),
        "longer captions": saved(2, "captions", np.pad(train["captions"], ((0, 0), (0, 1)))),
        "fewer captions": saved(2, "captions", train["captions"][1:]),
        "images of another type": saved(0, "images", train["images"].astype(np.float32)),
        "images of another size": saved(0, "images", train["images"][:, 1:]),
        "forms that are none": said(forms=[1, 2]),
        "no forms": said(forms={}),
        "forms of another split": said(forms={**meta["forms"], "../x": forms}),
        "classes that are numbers": said(classes=[1]),
        "a number for notes": said(notes=3),
        "levels": said(levels="many"),
        "a list": lambda: (place / "meta.json").write_text("[]"),
        "deep nesting": lambda: (place / "meta.json").write_text("[" * 100_000),
    }


@pytest.mark.parametrize("way", range(15))
def test_a_decoded_copy_whose_arrays_disagree_is_made_again(way, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    images(root / "a", 6)
    for number in range(6):
        (root / "a" / f"{number:03d}.txt").write_text(f"image {number}")
    first, _ = captions(root)
    (meta,) = cache.cache_dir().glob("decoded/*/meta.json")
    list(broken(meta.parent).values())[way]()
    found, data = captions(root)
    assert found == first
    assert note(data, "decoded again: ")
    assert not captions(root)[1].notes


def test_nothing_is_written_beside_the_images(tmp_path):
    images(tmp_path, 4)
    before = sorted(tmp_path.rglob("*"))
    load(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
