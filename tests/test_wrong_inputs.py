"""One table of wrong inputs, each of which must give one clear line and exit code 2.

A row is (arguments, text) or (arguments, text, prepare): the line on stderr must match the regular
expression `text`, and `prepare(folder)` makes files in the working directory first.  The rows run
in this process, one after another; what needs a process of its own is at the end.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, expect_one_line, user_environment
from data_sets import png, write

PNG = png()
DIGITS = ("--experiment=vae_digits", "--debug")

# Flags and config fields.
FLAGS = [
    ([], "--experiment=NAME is missing; there are: autoencoder_shapes"),
    (["--experiment=vae_mnits"], 'no "vae_mnits"; did you mean "vae_mnist"'),
    (["--experiment="], "--experiment"),
    (["vae_mnist"], '"vae_mnist" is no flag'),
    (["--experment=vae_mnist"], 'unknown flag "--experment"; did you mean "experiment"'),
    ([*DIGITS, "--mode=predict"], 'no "predict"'),
    ([*DIGITS, "--parallel=magic"], 'no "magic"'),
    ([*DIGITS, "--seed=seven"], "--seed=seven"),
    ([*DIGITS, "--seed=-1"], "--seed=-1"),
    ([*DIGITS, "--debug=perhaps"], "debug"),
    ([*DIGITS, "--workdir"], "workdir"),
    ([*DIGITS, "--config.stepps=3"], 'unknown field "--config.stepps"; did you mean "steps"'),
    ([*DIGITS, "--config.steps=three"], "--config.steps=three: must be a whole number"),
    ([*DIGITS, "--config.steps=0"], "must be at least 1"),
    ([*DIGITS, "--config.steps"], "needs a value"),
    ([*DIGITS, "--config.batch_size=-4"], "must be at least 1"),
    ([*DIGITS, "--config.learning_rate=nan"], "finite"),
    ([*DIGITS, "--config.likelihood=poisson"], "must be one of bernoulli, gaussian"),
    ([*DIGITS, "--config.hidden=32,x"], "must be a whole number"),
    ([*DIGITS, "--config.hidden="], "one value or more"),
    ([*DIGITS, "--config.beta2=2"], "must be at most"),
    ([*DIGITS, "--config.data=prefetch"], 'no data set "prefetch"'),
    ([*DIGITS, "--seed=99999999999999999999"], "--seed="),
    ([*DIGITS, "--nodebug=1"], "nodebug"),
    ([*DIGITS, "--workdir="], "--workdir= is empty"),
    ([*DIGITS, "--config.shape=9,9,1"], "follows from the data set"),
    ([*DIGITS, "--config.data=mnits"], 'no data set "mnits"; did you mean "mnist"'),
    ([*DIGITS, "--config.data=mnist"], "data set mnist is not prepared"),
    ([*DIGITS, "--config.data=kmnist"], "TFDS needs TensorFlow to prepare it"),
    ([*DIGITS, "--config.data=folder:/no/such"], 'no folder "/no/such"'),
    ([*DIGITS, "--config.data=digits:huge"], "size must be a number"),
    ([*DIGITS, "--config.network=conv", "--config.hidden=4,4,4,4"], "does not divide by 16"),
    ([*DIGITS, "--workdir=/proc/nothing"], "cannot write to /proc/nothing"),
    (["--experiment=vae_fashion_mnist", "--debug"], "data set fashion_mnist is not prepared"),
    (["--mode=sample"], "needs --workdir=DIR or --experiment=NAME"),
    (["--mode=eval", "--experiment=vae_digits"], "no run in runs/vae_digits; train one"),
    (["--mode=sample", "--workdir=nowhere"], "no run in nowhere"),
    ([*DIGITS, "--num_samples=3"], "--num_samples goes with --mode=sample"),
    ([*DIGITS, "--split=validation"], "--split goes with --mode=eval"),
    ([*DIGITS, "--config.validation=1437"], "validation=1437: digits has 1437 training images"),
    ([*DIGITS, "--config.validation=-1"], "must be at least 0"),
    (["--mode=sample", "--workdir=x", "--num_samples=0"], "--num_samples=0"),
]

# A run directory that is there: rows get its --workdir.
RUNS = [
    (["--experiment=vae_mnist", "--debug"], "holds a run of vae_digits, not of vae_mnist"),
    ([*DIGITS, "--config.latents=3"], "latents was 2, is 3"),
    ([*DIGITS, "--seed=5"], "seed was 0, is 5"),
    ([*DIGITS, "--config.data=digits:16"], "data name was digits, is digits:16"),
    ([*DIGITS, "--config.steps=7"], "at step 20 already"),
    (["--mode=sample", "--steps=10"], "--steps means nothing to this run"),
    (["--mode=sample", "--guidance=2"], "--guidance means nothing"),
    (["--mode=sample", "--out=x.jpg"], "must end in .png or .npz"),
    (["--mode=sample", "--out=no/x.png"], "there is no folder no"),
    (["--mode=eval", "--config.latents=3"], "latents is what the run .* was trained with"),
    (["--mode=eval", "--experiment=vae_mnist"], "holds a run of vae_digits"),
    (["--experiment=beta_vae_mnist", "--debug"], "holds a run of vae_digits, not of beta_vae"),
]


def files(names, content=PNG):
    """Write image files into the folder `images`."""

    def make(folder):
        for name in names:
            write(folder / "images" / name, content)

    return make


def pipe(folder):
    """A folder with a named pipe for an image."""
    (folder / "images").mkdir()
    os.mkfifo(folder / "images" / "a.png")


def table(name, *rows):
    """Write images and a file of captions, a row of which is an object or a line."""

    def make(folder):
        files(["0.png", "1.png", "2.png"])(folder)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        write(folder / "images" / name, "\n".join(lines).encode())

    return make


def texts(*captions):
    """Write images, each with its text file."""

    def make(folder):
        for number, caption in enumerate(captions):
            write(folder / "images" / f"{number}.png", png(number))
            write(folder / "images" / f"{number}.txt", caption.encode())

    return make


OWN = ("--experiment=vae_fashion_mnist", "--debug", "--config.data=folder:images")
CLASSIFIER = ("--experiment=classifier_digits", "--debug", "--config.data=folder:images")
TEXT = ("--experiment=text_encoder_shapes", "--debug", "--config.data=folder:images")

# Images and captions of the user's own.
DATA = [
    (OWN, 'no folder "images"; give one as --config.data=folder:PATH'),
    (OWN, "no images in .*images .looked for", files(["a.txt", "b.heic"])),
    (OWN, "no images in .*images .looked for", files([".a.png", ".b/c.png", "__MACOSX/d.png"])),
    (OWN, "no images in .*images.*not a regular file", pipe),
    (OWN, "none of the 2 images .* can be read: a.png .not an image",
     files(["a.png", "b.gif"], b"")),
    (OWN, "none of the 1 images .* can be read", files(["a.jpg"], b"<html>")),
    (OWN, "no folder .*images", lambda folder: write(folder / "images", b"a file")),
    (OWN, "no folder .*images", lambda folder: os.mkfifo(folder / "images")),
    ([*OWN[:2], "--config.data=folder:~nosuchuser/images"], "no folder .*nosuchuser"),
    ([*OWN[:2], "--config.data=folder:"], 'no folder ""'),
    ([*OWN[:2], "--config.data=folder:" + "a" * 5000], "no folder"),
    (OWN, "2 folders of the validation split: valid, val",
     files(["train/a.png", "val/b.png", "valid/c.png"])),
    (OWN, "2 folders of the test split: test, testing",
     files(["train/a.png", "test/b.png", "testing/c.png"])),
    (OWN, "has val and test, but no folder train beside", files(["test/a.png", "val/b.png"])),
    (OWN, "has dev, but no folder train beside", files(["a/a.png", "dev/b.png"])),
    (OWN, "train and val lie in .*birds: give folder:",
     files(["birds/train/a.png", "birds/val/b.png"])),
    (TEXT, "has no captions.*; text-to-image needs", files(["0.png", "1.png", "2.png"])),
    (TEXT, "no captions", texts("", " ", "\n")),
    (TEXT, "no captions", texts("\ufeff", "\u2028", "\t")),
    (TEXT, "line 1: .*it has file_name, title",
     table("metadata.jsonl", {"file_name": "0.png", "title": "a"})),
    (TEXT, "line 2: .*it has path, text",
     table("metadata.jsonl", "", {"path": "0.png", "text": "a"})),
    (TEXT, "line 1: text must be a text, not 7",
     table("metadata.jsonl", {"file_name": "0.png", "text": 7})),
    (TEXT, "caption must be a text, not null",
     table("metadata.jsonl", {"file_name": "0.png", "caption": None})),
    (TEXT, r"prompt must be a text, not \[\]",
     table("metadata.jsonl", {"file_name": "0.png", "prompt": []})),
    (TEXT, "leads out of", table("metadata.jsonl", {"file_name": "../../0.png", "text": "a"})),
    (TEXT, "leads out of", table("metadata.jsonl", {"file_name": "/0.png", "text": "a"})),
    (TEXT, "leads out of",
     table("sub/metadata.jsonl", {"file_name": "..\\..\\0.png", "text": "a"})),
    (TEXT, "names no image of the folder",
     table("metadata.jsonl", {"file_name": "00.png", "text": "a"})),
    (TEXT, "names no image of the folder", table("sub/metadata.csv", "file_name,text", "0.png,a")),
    (TEXT, "metadata.jsonl, line 1: must be", table("metadata.jsonl", "[" * 100_000)),
    (TEXT, "metadata.jsonl, line 1: must be",
     table("metadata.jsonl", '{"file_name": "0.png", "text": "a"')),
    (TEXT, "it has file_name, label", table("metadata.csv", "file_name,label", "0.png,a")),
    (TEXT, "text must be a text, not null", table("metadata.csv", "file_name,text", "0.png")),
    (TEXT, "it has file_name;text", table("metadata.csv", "file_name;text", "0.png;a")),
    (CLASSIFIER, "needs a data set with labels", files(["0.png", "1.png", "2.png"])),
    (CLASSIFIER, "none of the .* test images of .* has a class",
     files(["train/a/0.png", "train/b/1.png", "train/a/2.png", "test/3.png"])),
    (CLASSIFIER, "none of the .* train images of .* has a class",
     files(["train/0.png", "train/1.png", "test/a/3.png"])),
    ([*OWN[:2], "--config.data=captions"], 'no data set "captions"'),
    ([*OWN[:2], "--config.data=tfds:mnist"], 'no data set "tfds:mnist"'),
    ([*OWN[:2], "--config.data=../mnist"], 'no data set "../mnist"'),
    ([*OWN[:2], "--config.data=huggingface:mnist"], 'no data set "huggingface:mnist"'),
    ([*OWN[:2], "--config.data=mnist/a=1,b=2"], 'no data set "mnist/a=1,b=2"'),
    ([*OWN[:2], "--config.data=mnist",
     "--data_dir=~nosuchuser/data"], "data set mnist is not prepared"),
]  # fmt: skip
# Directories and files of somebody else, and paths that cannot hold a run.


def has(path, content="somebody's"):
    """What writes a file, below the folder that it is given."""

    def prepare(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)

    return prepare


def has_folder(path):
    return lambda folder: (folder / path).mkdir(parents=True)


def has_pipe(path):
    return lambda folder: os.mkfifo(folder / path)


def has_link(path):
    """A link to a file, which is there."""

    def prepare(folder):
        has("victim")(folder)
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(folder / "victim")

    return prepare


def has_arrays(path):
    return lambda folder: np.savez(folder / path, images=np.zeros(3))


HERE = [*DIGITS, "--workdir=run"]
SAMPLE_HERE = ["--mode=sample", "--workdir=run"]
PLACES = [
    (HERE, "run is not empty and holds no run .metrics.jsonl", has("run/metrics.jsonl")),
    (HERE, "run is not empty and holds no run .summary.json", has("run/summary.json")),
    (HERE, "run is not empty and holds no run .images", has("run/images/cat.jpg")),
    (HERE, "run is not empty and holds no run .thesis", has("run/thesis/chapter1.tex")),
    (HERE, "run is not empty and holds no run .images", has_folder("run/images")),
    (HERE, "run is not empty and holds no run .checkpoints", has("run/checkpoints/epoch1.pt")),
    (HERE, "run holds checkpoints but no config.json", has("run/checkpoints/3/model.pt")),
    (HERE, "config.json is damaged, or is another program's", has("run/config.json", "{}")),
    (HERE, "config.json is damaged, or is another program's", has("run/config.json", "[" * 9**5)),
    (HERE, "config.json is not a file", has_folder("run/config.json")),
    (SAMPLE_HERE, "config.json is not a file", has_folder("run/config.json")),
    (HERE, "run is a file; give a directory", has("run")),
    ([*HERE, "--workdir=run/deeper"], "cannot (read|write)", has("run")),
    (HERE, "lock is a directory, where a run has a file", has_folder("run/lock")),
    ([*DIGITS, r"--workdir=a\b"], "cannot be kept in .*holds a backslash; give another --workdir"),
    ([*DIGITS, "--workdir=gs:/bucket"], "does not take this path .*give another --workdir"),
    ([*DIGITS, "--workdir=run[0]"], "does not take this path .*give another --workdir"),
    ([*DIGITS, "--workdir=" + os.fsdecode(b"\xff")], "not UTF-8; give another --workdir"),
    ([*DIGITS, "--workdir=" + "x" * 300], "File name too long"),
    ([*DIGITS, "--overwrite"], "--overwrite goes with --mode=sample"),
    ([*SAMPLE_HERE, "--guidance=nan"], "--guidance=nan: must be a finite number"),
    ([*SAMPLE_HERE, "--guidance=-inf"], "--guidance=-inf: must be a finite number"),
    ([*SAMPLE_HERE, "--guidance=1e999"], "--guidance=inf: must be a finite number"),
]

# Where samples may not go; rows get the --workdir of a run.
OUT = [
    (["--mode=sample", f"--out={name}"], says, *prepare)
    for name, says, *prepare in (
        ("cat.png", "is there and was not written by this program; give another", has("cat.png")),
        ("a.npz", "is there and was not written by this program", has_arrays("a.npz")),
        ("a.npz", "is there and was not written by this program", has("a.npz", "")),
        ("a.png", "a.png is a directory, not a file", has_folder("a.png")),
        ("a.npz", "a.npz is a pipe, not a file", has_pipe("a.npz")),
        ("a.png", "a.png is a link, not a file", has_link("a.png")),
        ("no/a.png", "there is no folder no"),
        ("cat/a.png", "there is no folder cat", has("cat")),
        ("/dev/null", "must end in .png or .npz"),
        ("x" * 300 + ".png", "File name too long"),
    )
]

# Faults of a run directory, made in a copy of a run.
FAULTS = [
    ([], "metrics.jsonl is a directory, where a run has a file", has_folder("metrics.jsonl")),
    ([], "timing.jsonl is a directory", has_folder("timing.jsonl")),
    ([], "summary.json is a directory", has_folder("summary.json")),
    ([], "lock is neither a file nor a directory", has_pipe("lock")),
    ([], "images is a file, where a run has a directory", has("images")),
    ([], "tensorboard is a file", has("tensorboard")),
    ([], "checkpoints is a file", has("checkpoints")),
    ([], "damaged is a file, where a run has a directory", has("damaged")),
    ([], "summary.json is damaged; move it away", has("summary.json", '{"step": 20}')),
    (["--mode=eval"], "eval.json is a directory", has_folder("eval.json")),
    (["--mode=eval"], "images is a file", has("images")),
    (["--mode=sample"], "images is a file", has("images")),
    (["--mode=sample"], "checkpoints is a file", has("checkpoints")),
    (["--mode=sample"], "drawn.png is a directory", has_folder("images/drawn.png")),
    (["--mode=sample"], "config.json is not a file", has_pipe("config.json")),
]


def row_id(row):
    return " ".join(map(str, row[0])) or "nothing"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a finished tiny run."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, ROOT / "launch.py", *DIGITS, f"--workdir={workdir}"]
    subprocess.run(command, env=user_environment(), check=True, capture_output=True, timeout=240)
    return workdir


@pytest.mark.parametrize("row", [*FLAGS, *DATA, *PLACES], ids=row_id)
def test_a_wrong_input_is_one_clear_line(launch_here, tmp_path, row):
    arguments, says, *prepare = row
    for step in prepare:
        step(tmp_path)
    before = contents(tmp_path)
    expect_one_line(launch_here(*arguments), says)
    assert contents(tmp_path) == before


def contents(folder):
    """Every file below a folder that is not empty, as the lock of a run is."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path: path.read_bytes() for path in files if path.stat().st_size}


@pytest.mark.parametrize("row", [*RUNS, *OUT], ids=row_id)
def test_a_wrong_input_about_a_run_is_one_clear_line_and_harms_nothing(
    launch_here, trained, tmp_path, row
):
    arguments, says, *prepare = row
    for step in prepare:
        step(tmp_path)
    before = [contents(folder) for folder in (trained, tmp_path)]
    expect_one_line(launch_here(*arguments, f"--workdir={trained}"), says)
    assert [contents(folder) for folder in (trained, tmp_path)] == before


@pytest.mark.parametrize("row", FAULTS, ids=row_id)
def test_a_fault_of_a_run_directory_is_one_clear_line(launch_here, trained, tmp_path, row):
    arguments, says, damage = row
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run" / word for word in says.split()[:1]):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    damage(tmp_path / "run")
    mode = arguments or [*DIGITS, "--config.steps=25"]
    expect_one_line(launch_here(*mode, "--workdir=run"), says)


def test_a_run_without_a_checkpoint_is_one_clear_line(launch_here, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((trained / "config.json").read_bytes())
    result = launch_here("--mode=sample", "--workdir=run")
    expect_one_line(result, "no checkpoint in run yet")


def test_a_damaged_config_is_one_clear_line(launch_here, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"experiment": "vae_')
    expect_one_line(launch_here("--mode=eval", "--workdir=run"), "config.json is damaged")


# In a process of their own.


@pytest.mark.parametrize(("arguments", "says"), [FLAGS[1], ([*DIGITS, "--config.steps=0"], "1")])
def test_a_wrong_input_is_one_clear_line_of_the_command(launch, arguments, says):
    expect_one_line(launch(*arguments), says)
