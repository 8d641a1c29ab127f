"""What long runs meet, injected for real into a training process: nothing is lost."""

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
    end_of,
    finish,
    largest_file,
    start,
    steps_kept,
    steps_of,
    wait_for,
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run directory with checkpoints of steps 20, 40 and 60, stopped on its way to 400."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    process = start(workdir)
    wait_for(lambda: (workdir / "checkpoints" / "60").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    return end_of(workdir)


def newest(workdir):
    return workdir / "checkpoints" / str(steps_kept(workdir)[-1])


def truncate(folder):
    path = largest_file(folder / "state")
    os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 4):
        content[place] ^= 0xFF
    path.write_bytes(content)


def flip_all(folder):
    """Whatever is read of the arrays, some of it is damaged."""
    for path in (folder / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[::50] = bytes(byte ^ 0xFF for byte in content[::50])
        path.write_bytes(content)


def flip_record(folder):
    (path,) = (file for file in (folder / "host").iterdir() if "window" in file.read_text())
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))


def half_write(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize(
    "damage",
    [truncate, *(pytest.param(f, marks=pytest.mark.slow) for f in (flip, flip_record, half_write))],
)
def test_a_damaged_checkpoint_is_logged_and_the_one_before_it_used(
    damage, stopped, whole, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    *_, before, last = steps_kept(workdir)
    damage(newest(workdir))
    finish(workdir)
    log = (tmp_path / "run.log").read_text()
    assert f"the checkpoint of step {last} is damaged" in log
    assert f"resuming at step {before}" in log
    assert end_of(workdir) == whole


def test_sampling_from_a_damaged_checkpoint_takes_the_one_before_and_changes_nothing(
    stopped, tmp_path, launch
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    *_, before, last = steps_kept(workdir)
    flip_all(newest(workdir))
    drawn = launch("--mode=sample", f"--workdir={workdir}", "--num_samples=4")
    assert drawn.returncode == 0, drawn.stderr
    damaged, sampling = drawn.stderr.strip().splitlines()
    assert damaged.startswith(f"the checkpoint of step {last} is damaged")
    assert sampling.startswith("sampling 4 images in 1 batch")
    assert f"step {before}:" in drawn.stdout
    assert int(newest(workdir).name) == last


def test_a_directory_with_damaged_checkpoints_alone_is_refused(stopped, tmp_path, launch):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for step in steps_kept(workdir):
        flip_all(workdir / "checkpoints" / str(step))
    refused = launch("--mode=sample", f"--workdir={workdir}")
    assert refused.returncode == 2
    assert "every checkpoint in" in refused.stderr


@pytest.mark.parametrize(
    ("host", "sums"),
    [({"window": 5}, None), ({"window": {"loss": "x"}}, None), ({"skipped": "y"}, None),
     ({}, 5), ({}, []), ({}, {}), ({}, {"arrays": 5, "host": 1})],
)  # fmt: skip
def test_a_checkpoints_record_of_another_form_is_an_error(host, sums):
    with pytest.raises(ValueError, match="another form"):
        check_record(host, sums)
    check_record({"window": {"loss": 1.5}, "skipped": 0}, {"arrays": [1, None], "host": 2})


def test_one_bit_anywhere_in_a_state_changes_its_check_sum():
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
def test_a_check_sum_is_the_same_by_numpy_and_on_devices(dtype):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)) * 3).astype(dtype)
    expected = int(sum_on_devices(array))
    assert int(sum_on_host(array)) == expected
    devices = jax.make_mesh((8,), ("devices",))
    spread = jax.device_put(array, NamedSharding(devices, PartitionSpec("devices")))
    assert int(sum_on_devices(spread)) == int(sum_on_host(spread)) == expected


@pytest.mark.slow
def test_a_full_disk_is_logged_and_the_run_goes_on(stopped, whole, tmp_path):
    """No file may grow: from a checkpoint on, everything that is written fails."""
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
    finish(workdir)  # with room again
    assert end_of(workdir) == whole


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, whole):
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
    assert end_of(workdir) == whole


@pytest.mark.slow
def test_a_data_directory_may_disappear_in_mid_run(tmp_path, launch):
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
        wait_for(lambda: steps_of(workdir) >= 5, process)
        shutil.rmtree(folder)
        code = process.wait(timeout=180)
    assert code == 0, (tmp_path / "log").read_text()
    again = launch(*command[2:-1], "--config.train.steps=80", f"--workdir={workdir}")
    assert again.returncode == 2
    assert "Traceback" not in again.stderr
    assert str(folder) in again.stderr


# Files from strangers.

EVIL = b"cos\nsystem\n(S'touch EVIL'\ntR."  # a pickle that runs a command


def test_no_file_of_a_run_directory_is_unpickled(stopped, tmp_path, launch):
    """Every file of a checkpoint in turn is a pickle that would run a command."""
    config = recorded.read(stopped).config
    shapes = step_module.state_shapes(checked_task(config), config, config.task.info.shape)
    like = sharding.make().like(shapes)
    checkpoints = open_checkpoints(stopped / "checkpoints", read_only=True)
    checkpoints.restore(steps_kept(stopped)[-1], like)  # as it is, it is read
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
            checkpoints.restore(steps_kept(stopped)[-1], like)
        checkpoints.close()
        assert not pathlib.Path("EVIL").exists()


def test_the_sources_load_nothing_through_pickle():
    for path in (
        *ROOT.glob("ddpm_jax/**/*.py"),
        *ROOT.glob("experiments/*.py"),
        ROOT / "launch.py",
    ):
        text = path.read_text()
        if path.name == "pth.py":  # which reads tensors alone: test_inception.py
            continue
        for word in ("import pickle", "cloudpickle", "joblib", "torch.load", "allow_pickle=True"):
            assert word not in text, f"{path} has {word}"


def test_a_path_in_a_strangers_config_is_not_written_to(stopped, tmp_path, launch):
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
def test_nothing_is_written_through_a_link_in_a_run_directory(name, stopped, tmp_path, launch):
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(stopped, workdir)
    outside.write_text("precious")
    path = workdir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside)
    refused = launch(*COMMAND[2:], f"--workdir={workdir}")
    assert refused.returncode == 2
    assert "is a link" in refused.stderr
    assert outside.read_text() == "precious"


def test_checkpoints_of_another_version_of_the_code_stay_where_they_are(stopped, tmp_path):
    checkpoints = open_checkpoints(shutil.copytree(stopped, tmp_path / "run") / "checkpoints")
    before = steps_kept(tmp_path / "run")
    with pytest.raises(UserError, match="damaged, or of another version of the code"):
        checkpoints.restore_newest({"w": jax.ShapeDtypeStruct((3,), np.float32)})
    checkpoints.close()
    assert steps_kept(tmp_path / "run") == before


def test_a_damaged_image_folder_runs_no_code(tmp_path, launch):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.npy", "c.pkl", "images.npy"):
        (folder / name).write_bytes(EVIL)
    refused = launch("--experiment=vae_fashion_mnist", "--debug", f"--config.data=folder:{folder}")
    assert refused.returncode == 2
    assert not list(tmp_path.rglob("EVIL"))
