"""A stored run of format 2 remains readable: it evaluates, samples, loads and resumes.

`tests/data/format_2` is the run directory of `python launch.py --experiment=ddpm_digits --debug`
with `FLAGS` on one CPU (jax 0.10.2), as commit cbaba11 wrote it. It has config.json, metrics.jsonl,
summary.json and the newest checkpoint; the checkpoint's commit_success.txt, which contained the
absolute path of the run, was edited. Users have runs of this format. Therefore, never make this run
again to pass these tests. If the format must change, raise `FORMAT`, add a function that reads
format 2, keep this run and these tests, and store a run of the new format beside it.
"""

import json
import math
import shutil

import jax
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax.config_records import to_record
from ddpm_jax.experiment import inputs
from ddpm_jax.experiment.recorded import load_state, read
from ddpm_jax.training.records import FORMAT
from helpers.launching import ROOT
from helpers.metric_table import undefined

DATA = ROOT / "tests" / "data"
STORED = DATA / "format_2"
FLAGS = (
    "--experiment=ddpm_digits",
    "--debug",
    "--config.task.network=dit",
    "--config.task.network.width=8",
    "--config.task.network.depth=1",
    "--config.task.network.heads=2",
    "--config.task.schedule=cosine",
    "--config.task.sampling.guidance_interval=-6,6",
    "--config.task.evaluation.batch_size=128",
    "--config.optimizer.learning_rate=0.005",
    "--config.optimizer.warmup_steps=0",
    "--config.ema.half_life_images=50",
    "--config.ema.power_widths=0.1",
    "--config.train.grad_accum_steps=2",
    "--config.train.checkpoint_every=0",
)
# Entries of config.json that describe the last process that trained, not the run.
OF_PROCESS = ("devices", "versions", "git_commit")
# (mean, root mean square) of the parameters and of their two averages.
MOMENTS = {
    "params": (-0.0019768653205314932, 0.15361726634068124),
    "half_life=50": (-0.0019774458852356834, 0.15361579515843415),
    "power=0.1": (-0.00197882132310544, 0.15361212433408777),
}
STEPS, RESUMED_STEPS = 6, 8


@pytest.fixture(autouse=True)
def _few_optimisations(monkeypatch):
    """Let evaluations compile as `--debug` does, so that all tests share compiled programs."""

    def set_up_jax(debug=False, *rest, **options):
        del debug
        original(True, *rest, **options)

    original = inputs.set_up_jax
    monkeypatch.setattr(inputs, "set_up_jax", set_up_jax)


@pytest.fixture
def run(tmp_path):
    """A copy of the stored run."""
    return shutil.copytree(STORED, tmp_path / "run")


def json_of(path):
    return json.loads(path.read_text())


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_contains(record, part, path=""):
    """Check that a record has all values of `part`; it may have more fields."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert name in record, f"{path}{name}"
            check_contains(record[name], value, f"{path}{name}.")
    else:
        assert record == part, path


def moments(tree):
    """Return the mean and the root mean square of all values of a tree."""
    arrays = [np.asarray(array, np.float64).ravel() for array in jax.tree.leaves(tree)]
    values = np.concatenate(arrays)
    return values.mean(), np.sqrt(np.square(values).mean())


def test_the_newest_stored_run_has_the_format_that_new_runs_have():
    """Raising `FORMAT` needs a stored run of the new format, and a reader of the old one."""
    numbers = {json_of(path)["format"]: path.parent.name for path in DATA.glob("*/config.json")}
    assert numbers[max(numbers)] == f"format_{FORMAT}"
    assert numbers[2] == STORED.name


def test_the_stored_run_names_no_machine():
    for path in filter(lambda path: path.is_file(), STORED.rglob("*")):
        content = path.read_bytes()
        assert not [word for word in (b"/tmp", b"/home", b"/root", b"/Users") if word in content]


def test_the_config_of_a_stored_run_is_the_same_after_reading(run):
    recorded = read(run)
    check_contains(to_record(recorded.run_config), json_of(run / "config.json")["config"])
    task = recorded.run_config.task
    assert type(task.network).__name__ == "DiT"  # a chosen section
    assert type(task.schedule).__name__ == "Cosine"  # a chosen section without fields
    assert task.sampling.guidance_interval == (-6.0, 6.0)
    assert recorded.run_config.ema.more_half_lives_images == ()
    assert recorded.run_config.data.validation is None


def test_the_metrics_of_a_stored_run_have_the_documented_form():
    lines = lines_of(STORED)
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 6]
    for line in lines:
        assert next(iter(line)) == "step"
        values = {name: value for name, value in line.items() if name != "step"}
        assert all(type(value) is float and math.isfinite(value) for value in values.values())
        assert len({name.partition("/")[0] for name in values}) == 1  # metrics of one split
        assert not undefined(line)
    splits = [list(line)[1].partition("/")[0] for line in lines]
    assert splits == ["train", "train", "validation", "train", "test"]
    assert lines[-1] == {"step": STEPS, **json_of(STORED / "summary.json")["metrics"]}


def test_a_stored_run_has_its_parameters_and_averages(run):
    trained = ddpm_jax.load_run(run)
    assert trained.step == STEPS
    assert moments(trained.variables.params) == pytest.approx(MOMENTS["half_life=50"], rel=1e-6)
    config, state = load_state(run, for_training=True)
    assert config.ema.names == ("half_life=50", "power=0.1")
    trees = dict(zip(("params", *config.ema.names), (state.params, *state.ema), strict=True))
    for name, tree in trees.items():
        assert moments(tree) == pytest.approx(MOMENTS[name], rel=1e-6), name
    count = sum(array.size for array in jax.tree.leaves(state.params))
    assert count == json_of(run / "summary.json")["parameters"]
    # `restore` accepts a checkpoint without check sums, but this one has them, and they were equal.
    host = json_of(run / "checkpoints" / str(STEPS) / "host" / "metadata")
    assert host["format"] == 2
    assert len(host["check_sums"]["arrays"]) == len(jax.tree.leaves(state))


def test_a_stored_run_evaluates_to_its_recorded_metrics(launch_here, run):
    result = launch_here("--mode=eval", f"--workdir={run}")
    assert result.returncode == 0, result.stderr
    summary, evaluation = json_of(run / "summary.json"), json_of(run / "eval.json")
    assert evaluation["step"] == summary["step"]
    metrics = {name: evaluation["metrics"][name] for name in summary["metrics"]}
    # The random numbers are the same on every machine and for every version of jax. Rounding in
    # float32 changed a mean by less than 1e-6 of its value (jax 0.10.2 and 0.12.0, one and eight
    # devices). With the initial parameters, the loss would be 4 % larger.
    assert metrics == pytest.approx(summary["metrics"], rel=1e-3)


def test_a_stored_run_samples_images(launch_here, run, tmp_path):
    out = tmp_path / "images.npz"
    for average in ("first", "power=0.1"):
        command = ["--mode=sample", f"--workdir={run}", f"--out={out}", "--num_samples=8"]
        result = launch_here(*command, f"--config.ema.evaluated={average}")
        assert result.returncode == 0, result.stderr
        images = np.load(out)["images"]
        assert images.shape == (8, 8, 8, 1)
        assert images.dtype == np.uint8
        assert images.std() > 0


def test_a_stored_run_resumes(launch_here, run):
    finished = launch_here(*FLAGS, f"--workdir={run}")  # reads the summary, and trains no further
    assert finished.returncode == 0, finished.stderr
    assert "test/loss" in finished.stdout
    assert {path.name for path in (run / "checkpoints").iterdir()} == {str(STEPS)}
    result = launch_here(*FLAGS, f"--workdir={run}", f"--config.train.steps={RESUMED_STEPS}")
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {STEPS}" in result.stderr
    assert "damaged" not in result.stderr
    before, after = lines_of(STORED), lines_of(run)
    assert after[: len(before)] == before
    trained, final = after[len(before) :]
    assert trained["step"] == final["step"] == RESUMED_STEPS
    assert trained.keys() == before[0].keys()
    assert final.keys() == before[-1].keys()
    assert all(math.isfinite(value) for value in (*trained.values(), *final.values()))
    assert final["test/loss"] < before[-1]["test/loss"]
    # The program writes config.json and a checkpoint here as in a new run.
    record, stored = json_of(run / "config.json"), json_of(STORED / "config.json")
    stored["config"]["train"]["steps"] = RESUMED_STEPS
    stored["format"] = FORMAT
    check_contains(record, {key: stored[key] for key in stored.keys() - set(OF_PROCESS)})
    assert record.keys() >= stored.keys()
    checkpoint = json_of(run / "checkpoints" / str(RESUMED_STEPS) / "host" / "metadata")
    assert checkpoint["format"] == FORMAT
    summary = json_of(run / "summary.json")
    assert summary["step"] == RESUMED_STEPS
    assert summary.keys() >= json_of(STORED / "summary.json").keys()


def test_a_run_resumes_although_its_record_lacks_later_fields(launch_here, run):
    record = json_of(run / "config.json")
    del record["config"]["train"]["steps_per_call"]  # 1, the default of the field
    del record["config"]["task"]["vlb_weight"]
    (run / "config.json").write_text(json.dumps(record))
    result = launch_here(*FLAGS, f"--workdir={run}")
    assert result.returncode == 0, result.stderr
    result = launch_here(*FLAGS, f"--workdir={run}", "--config.train.steps_per_call=2")
    assert result.returncode == 2
    assert "train.steps_per_call was 1, is 2 now" in result.stderr
