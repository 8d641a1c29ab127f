"""Two processes on the loopback interface train one run."""

import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers.launching import ROOT, user_environment
from helpers.runs import LIMITED, checkpoint_steps, count_logged_lines, largest_file, wait_for

STEPS = 24


def command(workdir, *more, steps=STEPS):
    return [
        sys.executable, str(ROOT / "launch.py"), "--experiment=vae_digits", "--debug",
        f"--config.train.steps={steps}", "--config.train.checkpoint_every=8",
        "--config.train.eval_every=12", "--config.train.log_every=4", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def start(workdir, devices, *more, limit=None, cwd=None, **named):
    """Start a process; `limit` is the maximum size in bytes of a file that it writes."""
    argv, environment = command(workdir, *more, **named), {}
    if limit:
        argv = [sys.executable, "-c", LIMITED.format(size=limit, argv=argv[1:])]
        environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    flags = f"--xla_force_host_platform_device_count={devices}"
    log = (workdir.parent / f"{workdir.name}{len(list(workdir.parent.glob('*.log')))}.log").open(
        "w"
    )
    return subprocess.Popen(
        argv, env=user_environment(XLA_FLAGS=flags, **environment), stdout=log, stderr=log, cwd=cwd
    )


def start_two(workdir, *more, each=({}, {}), **named):
    """Start two processes of a run; `each` has the arguments of only one of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdir, 2, "--distributed", f"--coordinator=localhost:{port}", "--num_processes=2",
            f"--process_id={number}", *more, **named, **each[number],
        )
        for number in range(2)
    ]  # fmt: skip


def logs(workdir):
    return "\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(workdir.parent.glob("*.log")))


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def assert_equal_lines(actual, expected):
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def single_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("single") / "run"
    assert start(workdir, 4).wait(timeout=240) == 0, logs(workdir)
    return lines_of(workdir)


@pytest.mark.parametrize(
    "mode",
    [
        "jit",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("pmap", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_same_run_as_one_process(mode, single_process, tmp_path):
    workdir = tmp_path / "run"
    both = start_two(workdir, f"--parallel={mode}")
    assert [process.wait(timeout=240) for process in both] == [0, 0], logs(workdir)
    assert_equal_lines(lines_of(workdir), single_process)
    assert (workdir / "summary.json").exists()
    assert "step 24" in (tmp_path / "run0.log").read_text()
    assert "step 24" not in (tmp_path / "run1.log").read_text()  # only process 0 logs


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_ends_and_both_resume(tmp_path):
    workdir, steps = tmp_path / "run", 4000
    both = start_two(workdir, steps=steps)
    wait_for(
        lambda: (workdir / "checkpoints" / "8").exists() and count_logged_lines(workdir) > 5,
        both[0],
    )
    both[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert both[0].wait(timeout=120) != 0, logs(workdir)
    assert time.monotonic() - killed < 60
    time.sleep(2)  # the exit watchdog, another process, prints the message
    assert "start all processes again" in (tmp_path / "run0.log").read_text()
    last = checkpoint_steps(workdir)[-1]  # an incomplete checkpoint has another name
    steps = last + 40
    both = start_two(workdir, steps=steps)
    assert [process.wait(timeout=240) for process in both] == [0, 0], logs(workdir)
    assert "resuming at step" in logs(workdir)
    assert [line["step"] for line in lines_of(workdir) if "train/loss" in line] == [
        *range(4, steps + 1, 4)
    ]


def test_after_sigterm_to_one_process_both_write_a_checkpoint_and_exit_with_0(tmp_path):
    workdir = tmp_path / "run"
    both = start_two(workdir, steps=4000)
    wait_for(lambda: count_logged_lines(workdir) > 3, both[0])
    both[1].send_signal(signal.SIGTERM)  # a signal to one process only
    signalled = time.monotonic()
    assert [process.wait(timeout=120) for process in both] == [0, 0], logs(workdir)
    assert time.monotonic() - signalled < 30
    assert "stopped at step" in (tmp_path / "run0.log").read_text()


def test_a_wrong_flag_is_reported_by_both_processes_and_neither_waits(tmp_path):
    both = start_two(tmp_path / "run", "--config.train.batch_size=6")
    assert [process.wait(timeout=120) for process in both] == [2, 2]
    assert "each batch is divided over 4 devices" in (tmp_path / "run0.log").read_text()


@pytest.mark.slow
def test_a_full_disk_of_one_of_two_processes_is_logged_and_the_run_continues(tmp_path):
    workdir, more = tmp_path / "run", ("--parallel=fsdp", "--config.optimizer.lr_schedule=constant")
    both = start_two(workdir, *more, steps=8)
    assert [process.wait(timeout=240) for process in both] == [0, 0], logs(workdir)
    assert checkpoint_steps(workdir) == [8]
    started = time.monotonic()
    both = start_two(workdir, *more, each=({}, {"limit": 10_000}))
    assert [process.wait(timeout=240) for process in both] == [1, 1], logs(workdir)
    assert time.monotonic() - started < 120
    for step in (12, 16, 24):
        assert f"cannot write the checkpoint of step {step}: process 1: " in logs(workdir)
    assert checkpoint_steps(workdir) == [8]
    assert "the last checkpoint, of step 24, could not be written" in logs(workdir)
    both = start_two(workdir, *more)  # without the limit
    assert [process.wait(timeout=240) for process in both] == [0, 0], logs(workdir)
    assert "resuming at step 8" in (tmp_path / "run4.log").read_text()
    assert checkpoint_steps(workdir)[-1] == 24


@pytest.mark.slow
def test_a_directory_that_one_of_two_processes_cannot_write_is_logged_and_the_run_continues(
    tmp_path,
):
    workdir = tmp_path / "run"
    both = start_two(workdir, each=({}, {"limit": 1000}))
    assert [process.wait(timeout=240) for process in both] == [1, 1], logs(workdir)
    assert "cannot write the checkpoint of step 8: process 1: " in logs(workdir)
    assert checkpoint_steps(workdir) == []


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_for_one_of_two_processes_is_not_used(
    single_process, tmp_path
):
    """The processes read a file of it from different directories; one of the copies is cut."""
    workdir, directories = tmp_path / "run", (tmp_path / "good", tmp_path / "bad")
    both = start_two(workdir)
    assert [process.wait(timeout=240) for process in both] == [0, 0], logs(workdir)
    *_, before, last = checkpoint_steps(workdir)
    part = largest_file(workdir / "checkpoints" / str(last) / "state")
    content = part.read_bytes()
    for directory, size in zip(directories, (len(content), len(content) // 2), strict=True):
        directory.mkdir()
        (directory / "part").write_bytes(content[:size])
    part.unlink()
    part.symlink_to("/proc/self/cwd/part")
    (workdir / "summary.json").unlink()
    both = start_two(workdir, each=[{"cwd": directory} for directory in directories])
    assert [process.wait(timeout=240) for process in both] == [0, 0], logs(workdir)
    log = (tmp_path / "run2.log").read_text()
    assert f"the checkpoint of step {last} is damaged: process 1: " in log
    assert f"resuming at step {before}" in log
    assert (workdir / "damaged" / str(last)).exists()
    assert checkpoint_steps(workdir)[-1] == last
    assert_equal_lines(lines_of(workdir), single_process)


@pytest.mark.slow
def test_after_sigterm_during_an_evaluation_both_processes_stop_it(tmp_path):
    workdir, long = tmp_path / "run", ["--config.task.network.hidden=2048,2048"]
    long += ["--config.task.eval_batch_size=4", "--config.task.iwae_images=360"]
    both = start_two(workdir, *long, steps=8)
    wait_for(lambda: "evaluating" in (tmp_path / "run0.log").read_text(), both[0])
    time.sleep(3)
    both[1].send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    assert [process.wait(timeout=120) for process in both] == [0, 0], logs(workdir)
    assert time.monotonic() - signalled < 30
    assert "stopped at step 8 of 8" in (tmp_path / "run0.log").read_text()
    assert checkpoint_steps(workdir) == [8]
    assert not (workdir / "summary.json").exists()
