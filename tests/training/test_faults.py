"""Faults of long runs, injected into a real training process, lose no result."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError
from ddpm_jax.experiment import recorded
from ddpm_jax.experiment.types import checked_task
from ddpm_jax.parallel import sharding
from ddpm_jax.training import step as step_module
from ddpm_jax.training.check_sums import (
    check_record,
    check_sums,
    sum_on_devices,
    sum_on_host,
)
from ddpm_jax.training.checkpoint import open_checkpoints
from helpers.launching import ROOT, user_environment
from helpers.runs import (
    COMMAND,
    LIMITED,
    checkpoint_steps,
    count_logged_lines,
    finish,
    largest_file,
    result_of,
    start,
    wait_for,
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run directory with checkpoints of steps 20, 40 and 60, of a run of 400 steps."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    process = start(workdir)
    wait_for(lambda: (workdir / "checkpoints" / "60").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The result of a run without faults."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(workdir)
    return result_of(workdir)


def newest(workdir):
    return workdir / "checkpoints" / str(checkpoint_steps(workdir)[-1])


def truncate(checkpoint):
    path = largest_file(checkpoint / "state")
    os.truncate(path, path.stat().st_size // 2)


def flip(checkpoint):
    """Invert four bytes."""
    path = largest_file(checkpoint / "state")
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 4):
        content[i] ^= 0xFF
    path.write_bytes(content)


def flip_all(checkpoint):
    """Damage every array: invert every 50th byte of every file."""
    for path in (checkpoint / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::50] = bytes(byte ^ 0xFF for byte in content[::50])
        path.write_bytes(content)


def flip_record(checkpoint):
    """Change one digit of the host record."""
    (path,) = (file for file in (checkpoint / "host").iterdir() if "window" in file.read_text())
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))


def half_write(checkpoint):
    shutil.rmtree(checkpoint / "state")


@pytest.mark.parametrize(
    "damage",
    [truncate, *(pytest.param(f, marks=pytest.mark.slow) for f in (flip, flip_record, half_write))],
)
def test_a_run_logs_a_damaged_checkpoint_and_resumes_from_the_one_before_it(
    damage, stopped, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    *_, before, last = checkpoint_steps(workdir)
    damage(newest(workdir))
    finish(workdir)
    log = (tmp_path / "run.log").read_text()
    assert f"the checkpoint of step {last} is damaged" in log
    assert f"moved the checkpoint of step {last} to {workdir / 'damaged'}" in log
    assert f"resuming at step {before}" in log
    assert result_of(workdir) == uninterrupted


def test_sampling_skips_a_damaged_checkpoint_and_changes_no_file(stopped, tmp_path, launch):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    *_, before, last = checkpoint_steps(workdir)
    flip_all(newest(workdir))
    result = launch("--mode=sample", f"--workdir={workdir}", "--num_samples=4")
    assert result.returncode == 0, result.stderr
    damaged, sampling = result.stderr.strip().splitlines()
    assert damaged.startswith(f"the checkpoint of step {last} is damaged")
    assert sampling.startswith("sampling 4 images in 1 batch")
    assert f"step {before}:" in result.stdout
    assert int(newest(workdir).name) == last


def test_sampling_refuses_a_run_whose_checkpoints_are_all_damaged(stopped, tmp_path, launch):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for step in checkpoint_steps(workdir):
        flip_all(workdir / "checkpoints" / str(step))
    refused = launch("--mode=sample", f"--workdir={workdir}")
    assert refused.returncode == 2
    assert "every checkpoint in" in refused.stderr
    assert "none was changed; give another --workdir" in refused.stderr


@pytest.mark.parametrize(
    ("host", "sums"),
    [({"window": 5}, None), ({"window": {"loss": "x"}}, None), ({"skipped": "y"}, None),
     ({}, 5), ({}, []), ({}, {}), ({}, {"arrays": 5, "host": 1})],
)  # fmt: skip
def test_a_host_record_or_check_sums_of_wrong_types_raise_an_error(host, sums):
    with pytest.raises(ValueError, match="values of wrong types"):
        check_record(host, sums)
    check_record({"window": {"loss": 1.5}, "skipped": 0}, {"arrays": [1, None], "host": 2})


def test_a_change_of_any_bit_of_a_state_changes_its_check_sums():
    rng = np.random.default_rng(0)
    state = {"a": rng.normal(size=(5, 7)).astype(np.float32), "b": np.arange(3, dtype=np.int32)}

    def sums(state):
        return check_sums(jax.tree.map(jnp.asarray, state), {})

    expected = sums(state)
    for _ in range(50):
        changed = {name: array.copy() for name, array in state.items()}
        name = rng.choice(["a", "b"])
        words = changed[name].view(np.uint32).reshape(-1)
        words[rng.integers(len(words))] ^= np.uint32(1 << rng.integers(32))
        assert sums(changed) != expected
    swapped = {**state, "a": np.roll(state["a"], 1)}
    assert sums(swapped) != expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_numpy_and_devices_compute_the_same_check_sum(dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)) * 3).astype(dtype)
    expected = int(sum_on_devices(array))
    assert int(sum_on_host(array)) == expected
    devices = jax.make_mesh((8,), ("devices",))
    sharded = jax.device_put(array, NamedSharding(devices, PartitionSpec("devices")))
    assert int(sum_on_devices(sharded)) == int(sum_on_host(sharded)) == expected


@pytest.mark.slow
def test_a_full_disk_is_logged_and_the_run_continues(stopped, uninterrupted, tmp_path):
    """A limit on the size of files makes every write after a checkpoint fail."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    last = newest(workdir)
    before = {path: path.read_bytes() for path in last.rglob("*") if path.is_file()}
    argv = [*COMMAND[1:], f"--workdir={workdir}"]
    size = (workdir / "metrics.jsonl").stat().st_size + 300
    full = subprocess.run(
        [sys.executable, "-c", LIMITED.format(size=size, argv=argv)],
        env=user_environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert "cannot write the checkpoint" in full.stderr, full.stderr
    assert "step 400/400" in full.stderr, full.stderr  # it trained to its end
    assert before == {path: path.read_bytes() for path in last.rglob("*") if path.is_file()}
    finish(workdir)  # without the limit
    assert result_of(workdir) == uninterrupted


def test_a_clock_that_jumps_back_does_not_change_the_result(tmp_path, uninterrupted):
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import time\n"
        "real, calls = time.time, [0]\n"
        "def jumping():\n"
        "    calls[0] += 1\n"
        "    return real() - (86400 * 365 if calls[0] > 300 else 0)\n"
        "time.time = jumping\n"
    )
    workdir = tmp_path / "run"
    environment = user_environment()
    paths = [str(patch), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    subprocess.run(
        [*COMMAND, f"--workdir={workdir}"], env=environment, check=True, timeout=180,
        capture_output=True,
    )  # fmt: skip
    times = [json.loads(line)["time"] for line in (workdir / "timing.jsonl").open()]
    assert min(np.diff(times)) < -86400 * 300  # it did jump
    assert result_of(workdir) == uninterrupted


@pytest.mark.slow
def test_a_run_ends_well_if_its_data_directory_is_removed_during_it(tmp_path, launch):
    from PIL import Image

    folder, workdir = tmp_path / "images", tmp_path / "run"
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(30):
            image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / label / f"{number}.png")
    command = [
        sys.executable, str(ROOT / "launch.py"), "--experiment=vae_fashion_mnist", "--debug",
        f"--config.data=folder:{folder}", "--config.train.steps=60", "--config.train.eval_every=20",
        "--config.train.log_every=1", "--config.train.checkpoint_every=10", f"--workdir={workdir}",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=user_environment(), stdout=log, stderr=log)
        wait_for(lambda: count_logged_lines(workdir) >= 5, process)
        shutil.rmtree(folder)
        code = process.wait(timeout=180)
    assert code == 0, (tmp_path / "log").read_text()
    again = launch(*command[2:-1], "--config.train.steps=80", f"--workdir={workdir}")
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    assert str(folder) in again.stderr


# Files from untrusted sources.

EVIL = b"cos\nsystem\n(S'touch EVIL'\ntR."  # a pickle that runs a command


def test_no_file_of_a_run_directory_is_unpickled(stopped, tmp_path, launch):
    """Each file of a checkpoint in turn is replaced by a pickle that would run a command."""
    config = recorded.read(stopped).config
    shapes = step_module.state_shapes(checked_task(config), config, config.task.info.shape)
    like = sharding.make().abstract_state(shapes)
    checkpoints = open_checkpoints(stopped / "checkpoints", read_only=True)
    checkpoints.restore(checkpoint_steps(stopped)[-1], like)  # the original can be read
    checkpoints.close()
    for number, file in enumerate(sorted(path for path in newest(stopped).rglob("*"))):
        if not file.is_file() or file.stat().st_size == 0:
            continue
        workdir = tmp_path / f"run{number}"
        shutil.copytree(stopped, workdir)
        evil = workdir / file.relative_to(stopped)
        evil.write_bytes(EVIL)
        checkpoints = open_checkpoints(workdir / "checkpoints", read_only=True)
        with contextlib.suppress(UserError):  # damaged, unless the file is not needed
            checkpoints.restore(checkpoint_steps(stopped)[-1], like)
        checkpoints.close()
        assert not pathlib.Path("EVIL").exists()


def test_the_sources_do_not_use_pickle():
    for path in (
        *ROOT.glob("ddpm_jax/**/*.py"),
        *ROOT.glob("experiments/*.py"),
        ROOT / "launch.py",
    ):
        text = path.read_text()
        if path.name == "pth.py":  # it reads only tensors: test_inception.py
            continue
        for word in ("import pickle", "cloudpickle", "joblib", "torch.load", "allow_pickle=True"):
            assert word not in text, f"{path} has {word}"


def test_a_run_does_not_write_to_a_path_in_its_config_json(stopped, tmp_path, launch):
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(stopped, workdir)
    path = workdir / "config.json"
    record = json.loads(path.read_text())
    record["data_dir"] = str(elsewhere)
    record["data"]["name"] = "mnist"
    path.write_text(json.dumps(record))
    refused = launch("--mode=eval", f"--workdir={workdir}", TFDS_DATA_DIR="")
    assert refused.returncode == 2, refused.stderr
    assert not elsewhere.exists()
    record["experiment"] = "../../evil"
    path.write_text(json.dumps(record))
    refused = launch("--mode=sample", f"--workdir={workdir}")
    assert refused.returncode == 2
    assert "but there is no file experiments/" in refused.stderr


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "images", "checkpoints/99"])
def test_a_run_writes_nothing_through_a_link_in_its_directory(name, stopped, tmp_path, launch):
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(stopped, workdir)
    outside.write_text("precious")
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside)
    refused = launch(*COMMAND[2:], f"--workdir={workdir}")
    assert refused.returncode == 2
    assert "is a link, and a run writes nothing through links" in refused.stderr
    assert outside.read_text() == "precious"


def test_checkpoints_of_another_version_of_the_code_are_not_changed(stopped, tmp_path):
    checkpoints = open_checkpoints(shutil.copytree(stopped, tmp_path / "run") / "checkpoints")
    before = checkpoint_steps(tmp_path / "run")
    with pytest.raises(UserError, match="of another version of the code"):
        checkpoints.restore_newest({"w": jax.ShapeDtypeStruct((3,), np.float32)})
    checkpoints.close()
    assert checkpoint_steps(tmp_path / "run") == before


def test_a_damaged_image_folder_runs_no_code(tmp_path, launch):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.npy", "c.pkl", "images.npy"):
        (folder / name).write_bytes(EVIL)
    refused = launch("--experiment=vae_fashion_mnist", "--debug", f"--config.data=folder:{folder}")
    assert refused.returncode == 2
    assert not list(tmp_path.rglob("EVIL"))
