"""The command line works as documented, and reports each mistake in one line."""

import json
import os
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image

import launch
from ddpm_jax.errors import UserError
from helpers.launching import ROOT, expect_one_line, user_environment
from helpers.metric_table import undefined

DIGITS = ("--experiment=vae_digits", "--debug")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a finished tiny run."""
    import subprocess
    import sys

    workdir = tmp_path_factory.mktemp("runs") / "digits"
    result = subprocess.run(
        [sys.executable, ROOT / "launch.py", *DIGITS, f"--workdir={workdir}"],
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return workdir


def test_a_run_writes_the_files_that_the_readme_lists(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "timing.jsonl", "summary.json"} <= names
    assert {"images", "checkpoints", "tensorboard"} <= names
    for name in ("reconstructions", "samples", "latent_plane", "curves"):
        with Image.open(trained / "images" / f"{name}.png") as image:
            assert np.asarray(image).std() > 0, name
    record = json.loads((trained / "config.json").read_text())
    assert record["experiment"] == "vae_digits"
    assert record["data"]["levels"] == 17
    assert record["versions"]["jax"]
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if "validation/loss" in line] == [10]
    assert [line["step"] for line in lines if "test/loss" in line] == [20]
    metrics = json.loads((trained / "summary.json").read_text())["metrics"]
    for name in ("neg_elbo", "nll", "kl", "neg_iwae_1", "neg_iwae_64", "neg_iwae_1000",
                 "active_units", "bits_per_dim"):  # fmt: skip
        assert np.isfinite(metrics[f"test/{name}"]), name
    assert metrics["test/neg_elbo"] == pytest.approx(metrics["test/nll"] + metrics["test/kl"])
    lines += [json.loads(line) for line in (trained / "timing.jsonl").read_text().splitlines()]
    assert not undefined(name for line in lines for name in line)


def test_a_finished_run_prints_its_table_and_trains_no_further(launch, trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("checkpoints/**/*")}
    result = launch(*DIGITS, f"--workdir={trained}")
    assert result.returncode == 0
    assert "test/neg_elbo" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("checkpoints/**/*")} == before


def test_a_finished_run_resumes_when_its_number_of_steps_is_raised(launch, trained):

    longer = trained.parent / "longer"
    shutil.copytree(trained, longer)
    result = launch(*DIGITS, f"--workdir={longer}", "--config.train.steps=25")
    assert result.returncode == 0, result.stderr
    assert "resuming at step 20" in result.stderr
    assert json.loads((longer / "summary.json").read_text())["step"] == 25


def test_eval_computes_the_same_metrics_as_the_training(launch, trained):
    result = launch("--mode=eval", f"--workdir={trained}")
    assert result.returncode == 0, result.stderr
    summary = json.loads((trained / "summary.json").read_text())["metrics"]
    metrics = json.loads((trained / "eval.json").read_text())["metrics"]
    assert metrics == pytest.approx(summary, rel=1e-5)


def test_eval_of_the_validation_split_reports_its_metrics_only(launch, trained):
    before = (trained / "eval.json").read_bytes() if (trained / "eval.json").exists() else None
    result = launch("--mode=eval", "--split=validation", f"--workdir={trained}")
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((trained / "eval.json").read_text())
    assert evaluation["split"] == "validation"
    assert {name.partition("/")[0] for name in evaluation["metrics"]} == {"validation"}
    summary = json.loads((trained / "summary.json").read_text())["metrics"]
    assert {name.partition("/")[0] for name in summary} == {"test"}
    assert evaluation["metrics"]["validation/neg_elbo"] != summary["test/neg_elbo"]
    if before is not None:
        (trained / "eval.json").write_bytes(before)


def test_without_validation_images_a_run_trains_on_all_training_images(launch, tmp_path):
    result = launch(*DIGITS, "--config.data.validation=0", "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert "1437 training images, 128 test images" in result.stderr
    assert "has no validation split; the test split is evaluated after" in result.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["validation"] == 0
    assert "validation/" not in (tmp_path / "run/metrics.jsonl").read_text()
    result = launch("--mode=eval", "--split=validation", "--workdir=run")
    expect_one_line(result, "--split=validation: the run in run was trained on all")
    assert launch("--mode=eval", "--workdir=run").returncode == 0


def test_sampling_needs_no_flag_retyped(launch, trained, tmp_path):
    out = tmp_path / "sampled.npz"
    result = launch("--mode=sample", f"--workdir={trained}", "--num_samples=70", f"--out={out}")
    assert result.returncode == 0, result.stderr
    images = np.load(out)["images"]
    assert images.shape == (70, 8, 8, 1)
    assert images.dtype == np.uint8
    result = launch("--mode=sample", f"--workdir={trained}", "--num_samples=3", f"--out={out}")
    assert np.array_equal(
        np.load(out)["images"], images[:3]
    )  # image i does not depend on their number
    launch("--mode=sample", f"--workdir={trained}", "--num_samples=3", f"--out={out}", "--seed=1")
    assert not np.array_equal(np.load(out)["images"], images[:3])
    result = launch("--mode=sample", f"--workdir={trained}", f"--out={tmp_path}/sampled.png")
    assert result.returncode == 0
    with Image.open(tmp_path / "sampled.png") as image:
        assert image.size[0] > 8 * 8


def test_an_interrupted_final_evaluation_is_repeated_without_duplicate_lines(launch, trained):

    again = trained.parent / "again"
    shutil.copytree(trained, again)
    (again / "summary.json").unlink()  # as if the process was killed before writing it
    result = launch(*DIGITS, f"--workdir={again}")
    assert result.returncode == 0, result.stderr
    assert (again / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    assert (again / "summary.json").read_bytes() == (trained / "summary.json").read_bytes()


def test_a_run_on_four_devices_samples_and_evaluates_on_one(launch, tmp_path):
    devices = "--xla_force_host_platform_device_count=4"
    result = launch(*DIGITS, "--workdir=run", XLA_FLAGS=devices)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["devices"]["count"] == 4
    for mode in ("eval", "sample"):
        result = launch(f"--mode={mode}", "--workdir=run")
        assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    metrics = json.loads((tmp_path / "run" / "eval.json").read_text())["metrics"]
    assert metrics == pytest.approx(summary, rel=1e-4)


def test_a_run_that_failed_before_training_leaves_its_directory_usable(launch, tmp_path):
    devices = "--xla_force_host_platform_device_count=3"
    result = launch(*DIGITS, "--workdir=run", "--config.train.batch_size=32", XLA_FLAGS=devices)
    expect_one_line(result, "batch_size=32: must be a multiple of 3")
    assert launch(*DIGITS, "--workdir=run").returncode == 0


def test_a_folder_of_images_trains_and_an_equal_path_resumes_the_run(launch, tmp_path):
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 8), np.uint8)
        folder = tmp_path / "own" / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    result = launch(*DIGITS, "--config.data=folder:own", "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert "folder own" in result.stdout
    same = f"--config.data=folder:{tmp_path}/own"
    result = launch(*DIGITS, same, "--workdir=run", "--config.train.steps=25")
    assert result.returncode == 0, result.stderr


def test_without_mnist_a_run_uses_digits_and_nothing_names_them_mnist(launch, tmp_path):
    start = time.perf_counter()
    result = launch("--experiment=vae_mnist", "--debug", "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert time.perf_counter() - start < 60
    # The warning is logged at the start and at the end.
    assert result.stderr.count("WARNING: mnist is not available; this run uses digits") == 2
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert record["data"]["name"] == "digits:28"
    assert record["data_requested"] == "mnist"
    assert "mnist is not available" in summary["data_note"]
    assert "MNIST" not in summary["data"]
    assert "MNIST" not in result.stdout


def test_strict_data_makes_the_missing_set_an_error(launch, tmp_path):
    result = launch("--experiment=vae_mnist", "--debug", "--strict_data", "--workdir=run")
    expect_one_line(result, "data set mnist is not prepared")
    assert not (tmp_path / "run").exists()


def test_help_lists_experiments_and_their_fields_within_seconds(launch):
    start = time.perf_counter()
    result = launch("--help")
    assert time.perf_counter() - start < 3
    assert result.returncode == 0
    for path in ROOT.glob("experiments/[a-z]*.py"):
        assert path.stem in result.stdout
    result = launch("--experiment=vae_mnist", "--help")
    assert "--config.task.network.latents=int" in result.stdout


def test_profile_leaves_a_trace_of_five_steps(launch, tmp_path):
    traced = launch(*DIGITS, "--profile", "--workdir=run")
    assert traced.returncode == 0, traced.stderr
    assert "wrote a profiler trace; to view it, run tensorboard --logdir=" in traced.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


WANDB = """
import json, pathlib
class util:
    generate_id = staticmethod(lambda: "abc")
class Image:
    def __init__(self, image): self.shape = image.shape
class Run:
    def __init__(self, folder): self.folder = pathlib.Path(folder)
    def log(self, values, step):
        with (self.folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps([step, sorted(values)]) + "\\n")
    def finish(self): (self.folder / "finished").touch()
def init(*, project, name, id, resume, dir, config):
    assert (project, name, id, resume) == ("ddpm_jax", "run", "abc", "allow")
    assert config["experiment"] == "vae_digits"
    return Run(dir)
"""


def test_wandb_logs_a_run_if_it_is_installed(launch, tmp_path):
    missing = launch(*DIGITS, "--wandb", "--workdir=run")
    assert missing.returncode == 2
    assert "pip install wandb" in missing.stderr
    (tmp_path / "wandb.py").write_text(WANDB)  # a fake module that records its calls
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    logged = launch(*DIGITS, "--wandb", "--workdir=run", PYTHONPATH=path)
    assert logged.returncode == 0, logged.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "calls.jsonl").open()]
    assert [step for step, names in lines if "train/loss" in names] == [5, 10, 15, 20]
    assert any("images/samples" in names for _, names in lines)
    assert (tmp_path / "run" / "finished").exists()


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
        (lambda path: pathlib.Path(path).write_bytes(b"\xff\xfea\0"), "it is not a text in UTF-8"),
        (lambda path: pathlib.Path(path).write_bytes(b"\xef\xbb\xbf\n \n"), "holds no prompts"),
    ],
)
def test_a_file_that_holds_no_prompts_is_an_error(make, says, tmp_path):
    launch.define_flags()
    launch.parse([])
    make(str(tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match=says):
        launch.prompts_of(str(tmp_path / "prompts.txt"))
