"""Attacks and faults that must harm nothing: each leaves a trace if it succeeds.

A run directory may come from an untrusted source, the disk may be full, the directory removed.
"""

import contextlib
import copy
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.config_records import to_record
from ddpm_jax.errors import UserError, printable
from ddpm_jax.experiment import sample_files
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.training.checkpoint import check_can_store, open_checkpoints
from ddpm_jax.training.records import read_record
from helpers.launching import ROOT, expect_one_line, user_environment

DIGITS = ("--experiment=vae_digits", "--debug")


def trained_run(folder, experiment):
    command = [sys.executable, ROOT / "launch.py", f"--experiment={experiment}", "--debug"]
    command += [f"--workdir={folder / experiment}"]
    subprocess.run(command, env=user_environment(), check=True, capture_output=True, timeout=240)
    return folder / experiment


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The directory of a finished tiny run."""
    return trained_run(tmp_path_factory.mktemp("runs"), "vae_digits")


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    """The directory of a finished tiny class-conditional diffusion run."""
    return trained_run(tmp_path_factory.mktemp("runs"), "ddpm_digits")


@pytest.fixture
def run(vae, tmp_path):
    """A copy of a finished run, in the working directory."""
    return shutil.copytree(vae, tmp_path / "run")


# Links that lead out of a run directory.


def replace_by_link(path, target):
    """Replace a file or a folder by a link."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("mode", ["sample", "eval", "train"])
@pytest.mark.parametrize(
    "place", ["images/sampled.png", "images/samples.png", "eval.json", "profile/plugins/profile",
              "config.json.draft", "tensorboard/events", "metrics.jsonl", "wandb_id"],
)  # fmt: skip
def test_no_file_outside_of_a_run_directory_is_written(launch_here, run, tmp_path, mode, place):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    replace_by_link(run / place, victim)
    how = {"train": [*DIGITS, "--config.train.steps=25", "--profile"]}.get(mode, [f"--mode={mode}"])
    result = launch_here(*how, "--workdir=run")
    assert victim.read_text() == "precious"
    expect_one_line(result, "is a link, and a run writes nothing through links")


@pytest.mark.parametrize("name", ["checkpoints", "damaged", "wandb"])
def test_links_are_refused_whatever_a_run_directory_is_called(launch_here, run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    run.rename(tmp_path / name)
    replace_by_link(tmp_path / name / "profile" / "plugins", victim)
    more = ["--config.train.steps=25", "--profile"]
    result = launch_here(*DIGITS, *more, f"--workdir={name}")
    assert not list(victim.iterdir())
    expect_one_line(result, "is a link, and a run writes nothing through links")


def test_a_directory_with_files_of_the_system_or_a_killed_start_is_used(launch_here, tmp_path):
    for name in ("lost+found", ".cache", "checkpoints/.probe.abc/0"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in ("desktop.ini", ".DS_Store", "lock"):
        (tmp_path / "run" / name).touch()
    result = launch_here(*DIGITS, "--workdir=run", "--config.train.steps=2")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mode", ["sample", "eval", "train"])
@pytest.mark.parametrize("place", ["images", "tensorboard", "checkpoints", "damaged", "profile"])
def test_nothing_is_written_to_a_folder_outside_of_a_run_directory(
    launch_here, run, tmp_path, mode, place
):
    victim = tmp_path / "victim"
    shutil.copytree(run / place, victim) if (run / place).exists() else victim.mkdir()
    before = sorted(victim.rglob("*"))
    replace_by_link(run / place, victim)
    how = {"train": [*DIGITS, "--config.train.steps=25", "--profile"]}.get(mode, [f"--mode={mode}"])
    result = launch_here(*how, "--workdir=run")
    assert sorted(victim.rglob("*")) == before
    expect_one_line(result, "is a link, and a run writes nothing through links")


@pytest.mark.parametrize("mode", ["sample", "eval"])
def test_a_part_that_is_a_link_to_another_run_is_not_written_to(launch_here, run, tmp_path, mode):
    """`--mode=eval` and `--mode=sample` use the part `generator` of a text-to-image run."""
    chain = tmp_path / "chain"
    chain.mkdir()
    record = read_record(run)
    experiment = load_experiment("text_to_image_shapes")
    record |= {"experiment": experiment.name, "config": to_record(experiment.config)}
    (chain / "config.json").write_text(json.dumps(record))
    (chain / "generator").symlink_to(run)
    before = sorted(run.rglob("*"))
    result = launch_here(f"--mode={mode}", "--workdir=chain")
    assert sorted(run.rglob("*")) == before
    expect_one_line(result, "generator is a link")


@pytest.mark.slow
def test_the_runs_that_a_record_names_are_only_read(launch_here, ddpm, vae, tmp_path):
    """Nothing is written to the directories of a recorded feature network and guidance model."""
    run, other = shutil.copytree(ddpm, tmp_path / "run"), shutil.copytree(vae, tmp_path / "other")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    record = json.loads((run / "config.json").read_text())
    for section, field, value in (
        ("evaluation", "features", [str(other)]),
        ("sampling", "guidance_model", str(other)),
    ):
        changed = copy.deepcopy(record)
        assert field in changed["config"]["task"][section]
        changed["config"]["task"][section][field] = value
        (run / "config.json").write_text(json.dumps(changed))
        launch_here("--mode=eval", "--workdir=run", "--config.task.evaluation.num_samples=20")
        assert {p: p.read_bytes() for p in other.rglob("*") if p.is_file()} == before


# Control characters of an untrusted run reach no terminal.

EVIL = "\x1b]0;evil\x07\x1b[2J\x9b31m\u202eabc\u2028\x7f\rerror: hm"


def harmless(result):
    """Return True if the only control characters of the output are line ends."""
    text = (result.stdout + result.stderr).replace("\n", "")
    return printable(text) == text


@pytest.mark.parametrize(
    ("mode", "place"),
    [("sample", "experiment"), ("sample", "config/evil"), ("sample", "data_dir"),
     ("eval", "data/name"), pytest.param("eval", "data/title", marks=pytest.mark.slow),
     pytest.param("train", "data_note", marks=pytest.mark.slow)],
)  # fmt: skip
def test_control_characters_of_a_record_reach_no_terminal(launch_here, run, mode, place):
    record = json.loads((run / "config.json").read_text())
    section, _, field = place.rpartition("/")
    value = {EVIL: 1} if field == "evil" else {field: EVIL}
    (record[section] if section else record).update(value)
    (run / "config.json").write_text(json.dumps(record))
    how = [*DIGITS, "--config.train.steps=21"] if mode == "train" else [f"--mode={mode}"]
    assert harmless(launch_here(*how, "--workdir=run"))


def test_control_characters_of_a_summary_reach_no_terminal(launch_here, run):
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "metrics": {**summary["metrics"], EVIL: 1.0}}))
    result = launch_here(*DIGITS, "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert harmless(result)
    assert r"\x1b]0;evil\x07" in result.stdout
    for name in ("data", "data_note", "experiment"):
        path.write_text(json.dumps({**summary, name: EVIL}))
        result = launch_here(*DIGITS, "--workdir=run")
        assert harmless(result)
        expect_one_line(result, f"the value of {name} holds control characters")


def test_control_characters_of_a_path_reach_no_terminal(launch_here, run, tmp_path):
    run.rename(tmp_path / "\x1b[31mrun")
    for mode in ("sample", "eval"):
        result = launch_here(f"--mode={mode}", "--workdir=\x1b[31mrun")
        assert result.returncode == 0, result.stderr
        assert harmless(result)


def test_a_missing_permission_to_read_is_named(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        read_record(tmp_path)


@pytest.mark.parametrize("entries", [[".DS_Store", "lock"], ["lock", "checkpoints/"]])
def test_a_directory_without_files_of_a_user_is_used(launch_here, tmp_path, entries):
    (tmp_path / "run").mkdir()
    for entry in entries:
        path = tmp_path / "run" / entry
        path.mkdir() if entry.endswith("/") else path.touch()
    result = launch_here(
        *DIGITS, "--workdir=run", "--config.train.steps=1", "--config.train.eval_every=0"
    )
    assert result.returncode == 0, result.stderr


# Output files of samples.


def test_samples_replace_samples_and_other_files_only_with_overwrite(launch_here, run, tmp_path):
    sample = ("--mode=sample", "--workdir=run", "--num_samples=3")
    for name in ("a.png", "a.npz"):
        assert launch_here(*sample, f"--out={name}").returncode == 0
        assert launch_here(*sample, f"--out={name}").returncode == 0  # a file of samples
        (tmp_path / name).write_text("a text")
        expect_one_line(launch_here(*sample, f"--out={name}"), "not written by this program")
        assert (tmp_path / name).read_text() == "a text"
        assert launch_here(*sample, f"--out={name}", "--overwrite").returncode == 0
    Image.new("L", (9, 9)).save(tmp_path / "photo.png")
    expect_one_line(launch_here(*sample, "--out=photo.png"), "not written by this program")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Software"] == "ddpm_jax"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "a.png", "a.npz", "photo.png"}


@pytest.mark.slow
def test_arrays_of_samples_hold_their_labels(launch_here, ddpm, run, tmp_path):
    sample = ("--mode=sample", "--out=a.npz")
    assert launch_here(*sample, f"--workdir={ddpm}", "--num_samples=70").returncode == 0
    samples = dict(np.load(tmp_path / "a.npz"))
    assert samples["images"].shape == (70, 8, 8, 1)
    assert samples["labels"].dtype.kind == "i"
    assert samples["labels"].shape == (70,)
    assert set(samples["labels"]) == set(range(10))
    assert "prompts" not in samples
    label = int(samples["labels"][4])  # image 4 sampled with this label is the same image
    launch_here(*sample, f"--workdir={ddpm}", "--num_samples=5", f"--label={label}")
    again = dict(np.load(tmp_path / "a.npz"))
    assert again["labels"].tolist() == [label] * 5
    assert np.array_equal(again["images"][4], samples["images"][4])
    assert launch_here(*sample, "--workdir=run", "--num_samples=2").returncode == 0
    assert np.load(tmp_path / "a.npz")["labels"].tolist() == [-1, -1]


def test_arrays_of_samples_hold_their_prompts(tmp_path):
    file = sample_files.SampleFile(tmp_path / "a.npz", ("a red circle", "é"), 2)
    file.add(np.zeros((2, 4, 4, 3), np.float32), None)
    file.add(np.ones((1, 4, 4, 3), np.float32), None)
    file.write()
    arrays = dict(np.load(tmp_path / "a.npz"))
    assert arrays["prompts"].tolist() == ["a red circle", "a red circle", "é"]
    assert arrays["labels"].tolist() == [-1, -1, -1]
    assert arrays["images"][:, 0, 0, 0].tolist() == [128, 128, 255]


@pytest.mark.slow
def test_images_that_are_not_finite_are_an_error(launch_here, ddpm, tmp_path):
    sample = ("--mode=sample", f"--workdir={ddpm}", "--out=a.png", "--num_samples=2")
    diverging = (
        "--config.task.sampling.x0_thresholding=none",
        "--config.task.sampling.guidance=3e38",
    )
    result = launch_here(*sample, *diverging)
    assert result.returncode == 1, result.stdout
    assert "stopped: 128 of 128 values of the images are non-finite" in result.stderr
    assert not (tmp_path / "a.png").exists()
    run = shutil.copytree(ddpm, tmp_path / "run")
    images = {path: path.read_bytes() for path in (run / "images").iterdir()}
    result = launch_here("--mode=eval", "--workdir=run", *diverging)
    assert result.returncode == 1
    assert "non-finite" in result.stderr.splitlines()[-1]
    assert images == {path: path.read_bytes() for path in (run / "images").iterdir()}


@pytest.mark.slow
def test_training_continues_without_an_image_that_is_not_finite(launch_here, tmp_path):
    diverging = (
        "--config.task.sampling.x0_thresholding=none",
        "--config.task.sampling.guidance=3e38",
    )
    result = launch_here("--experiment=ddpm_digits", "--debug", *diverging, "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert "the image samples was not written: " in result.stderr
    assert "the image samples_00000004 was not written: " in result.stderr
    assert not (tmp_path / "run" / "images" / "samples.png").exists()
    assert (tmp_path / "run" / "images" / "levels.png").exists()


# launch.py with a compilation that takes a minute in C code, where no signal is handled.
COMPILES = f"""
import hashlib, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from ddpm_jax.parallel import partitioner
partitioner.compiled = lambda *_, **__: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**8)
runpy.run_path({str(ROOT / "launch.py")!r}, run_name="__main__")
"""


def sampling(*flags, size=100_000, start=None):
    program = ["-c", start] if start else [str(ROOT / "launch.py")]
    command = [sys.executable, *program, "--mode=sample", f"--num_samples={size}"]
    return subprocess.Popen(
        [*command, *map(str, flags)],
        env=user_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_the_images_sampled_so_far_are_written_when_sampling_is_stopped(
    ddpm, tmp_path, number, code
):
    out = tmp_path / "a.npz"
    process = sampling(f"--workdir={ddpm}", f"--out={out}", "--steps=100", size=10**7)
    lines = []
    for line in process.stderr:  # until the first batch is sampled
        lines.append(line)
        if "(compiled)" in line:
            break
    time.sleep(1)
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == code, rest
    assert "Traceback" not in rest
    arrays = np.load(out)
    assert f"the first {len(arrays['images'])} of 10000000 images are in {out}" in rest
    assert 0 < len(arrays["images"]) == len(arrays["labels"])
    assert lines[-1].startswith("image 64/10000000"), lines


def test_sampling_is_stopped_at_once_while_it_compiles(run, tmp_path):
    process = sampling(f"--workdir={run}", f"--out={tmp_path / 'a.png'}", start=COMPILES)
    assert process.stderr.readline().startswith("sampling 100000 images in 1563 batches of 64;")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 1, rest
    assert time.monotonic() - begun < 5
    assert rest == "stopped: by SIGTERM\n"
    assert not (tmp_path / "a.png").exists()


def test_samples_are_written_during_sampling_and_progress_is_shown(
    launch_here, run, tmp_path, monkeypatch
):
    sizes = []
    write = sample_files.SampleFile.write

    def write_and_record(self):
        write(self)
        with Image.open(tmp_path / "a.png") as image:
            sizes.append((self.size, image.size))

    monkeypatch.setattr(sample_files, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(sample_files.SampleFile, "write", write_and_record)
    result = launch_here("--mode=sample", "--workdir=run", "--num_samples=300", "--out=a.png")
    assert result.returncode == 0, result.stderr
    assert len(sizes) > 1
    assert [size for size, _ in sizes] == sorted(size for size, _ in sizes)
    assert sizes[0][0] < sizes[-1][0] == 300
    assert {width for _, (width, _) in sizes} == {sizes[-1][1][0]}  # the grid keeps its width
    lines = result.stderr.splitlines()
    assert lines[0].startswith("sampling 300 images in 5 batches of 64; the sampling program")
    assert lines[1] == "image 64/300  (compiled)"
    assert lines[-1].startswith("image 300/300")
    assert "images/s" in lines[-1]


# A run whose last checkpoint is not written ends with an error.


@contextlib.contextmanager
def files_end_at(size):
    """Limit the size of files in bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LONG = (*DIGITS, "--workdir=run", "--config.train.steps=30", "--config.train.eval_every=0",
        "--config.train.checkpoint_every=0", "--config.train.log_every=1")  # fmt: skip


def test_a_run_whose_last_checkpoint_cannot_be_written_ends_with_an_error(launch_here, tmp_path):
    launch_here(
        *LONG, "--workdir=other"
    )  # so that the compilation cache is full before files are limited
    with files_end_at(20_000):
        result = launch_here(*LONG)
    assert result.returncode == 1, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("stopped: the last checkpoint, of step 30, could not be written")
    assert last.endswith("to continue from the beginning")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert launch_here(*LONG).returncode == 0  # with room again
    assert (tmp_path / "run" / "checkpoints" / "30").exists()


def test_a_disk_that_is_full_from_the_start_is_one_line(launch_here):
    with files_end_at(4000):
        result = launch_here(*LONG)
    assert result.returncode == 1, result.stderr
    expect_one_line(result, "cannot store checkpoints in .*File too large; free disk space", code=1)


def during(workdir, fault):
    """Call `fault` from another thread after the run has logged some steps."""

    def wait():
        lines = workdir / "metrics.jsonl"
        while not lines.exists() or lines.read_bytes().count(b"\n") < 3:
            time.sleep(0.002)
        fault()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def removed(run):
    shutil.rmtree(run, ignore_errors=True)  # while files appear in it


def replaced_by_a_file(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (removed, "run was removed or renamed during the run"),
        (lambda run: run.rename(run.with_name("b")), "run was removed or renamed during the run"),
        (replaced_by_a_file, "the last checkpoint, of step .*, could not be written"),
    ],
)
def test_a_directory_that_vanishes_during_training_is_reported(launch_here, tmp_path, fault, says):
    run = tmp_path / "run"
    thread = during(run, lambda: fault(run))
    result = launch_here(*LONG, "--config.train.steps=600", "--config.train.steps_per_call=1")
    thread.join(10)
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("stopped: ")
    assert re.search(says, lines[-1]), lines[-1]


@pytest.mark.slow
def test_a_run_that_is_stopped_without_a_checkpoint_ends_with_an_error(tmp_path):
    flags = [*LONG, "--config.train.steps=1000000", "--config.train.log_every=1000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *flags],
        env=user_environment(XDG_CACHE_HOME=str(tmp_path)), cwd=tmp_path, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip  # its own cache, whose files are limited, too
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 1, rest
    assert "the last checkpoint, of step " in rest.splitlines()[-1]


@pytest.mark.parametrize("name", ["a?#%20b", "a\n*b", "~é -"])
def test_a_path_that_can_hold_checkpoints_is_not_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    start = time.perf_counter()
    check_can_store(tmp_path / name / "checkpoints")
    assert time.perf_counter() - start < 1
    assert list((tmp_path / name).rglob("*")) == [tmp_path / name / "checkpoints"]


def test_a_damaged_checkpoint_that_cannot_be_moved_is_one_line(launch_here, run):
    """It would be moved to `damaged/20`, but a file of that name must not be replaced."""
    checkpoint = run / "checkpoints" / "20"
    largest = max(
        (path for path in (checkpoint / "state").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(bytes(100))
    (run / "damaged").mkdir()
    (run / "damaged" / "20").write_text("a file")
    result = launch_here(*DIGITS, "--workdir=run", "--config.train.steps=25")
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("stopped: cannot move the damaged checkpoint")
    assert (run / "damaged" / "20").read_text() == "a file"
    folder = pathlib.Path(run / "checkpoints")
    with contextlib.closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        assert checkpoints.newest() == 20
