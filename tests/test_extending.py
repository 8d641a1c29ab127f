"""The examples of docs/extending.md and of the README, run in a copy of the project."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from helpers.launching import ROOT, user_environment

TEXT = (ROOT / "docs/extending.md").read_text()


def examples(heading):
    """Return the code blocks of a section."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def insert(path, before, code):
    """Insert code before a line of a file."""
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} contains {before!r} {text.count(before)} times"
    path.write_text(text.replace(before, f"{code.strip()}\n\n\n{before}"))


def replace(path, old, new):
    """Replace a text that a file contains once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} contains {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


@pytest.fixture
def copy(tmp_path):
    """Return a directory with a copy of the package, the experiments and launch.py."""
    for name in ("ddpm_jax", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", tmp_path)
    return tmp_path


def launch(copy, *arguments):
    """Run --debug in the copy with these arguments, and return the summary of the run."""
    command = [sys.executable, "launch.py", "--debug", "--workdir=run", *arguments]
    result = subprocess.run(
        command, cwd=copy, env=user_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((copy / "run/summary.json").read_text())


def entries(block, table):
    """Return the code before a table, the new entries of the table, and the code after it."""
    code, _, rest = block.partition(f"{table} = {{\n    ...\n")
    lines, _, after = rest.partition("}\n")
    return code, lines, after


@pytest.mark.slow
def test_the_sampler_schedule_weight_metric_network_and_data_set_of_the_guide_train(copy):
    maths, tasks = copy / "ddpm_jax/diffusion", copy / "ddpm_jax/tasks"
    (block,) = examples("A sampler")
    code, lines, _ = entries(block, "SAMPLERS: dict[str, SamplerEntry]")
    insert(maths / "samplers.py", "SAMPLERS: dict[str, SamplerEntry] = {\n", code)
    replace(maths / "samplers.py", '    "ddim": SamplerEntry', f'{lines}    "ddim": SamplerEntry')

    (block,) = examples("A noise schedule")
    code, _, union = block.rpartition("NoiseSchedule = ")
    old = re.search(r"^NoiseSchedule = .*\n", (maths / "schedules.py").read_text(), re.M)[0]
    replace(maths / "schedules.py", old, f"{code}NoiseSchedule = {union}")
    if "Positive" not in (maths / "schedules.py").read_text().split("class ")[0]:
        replace(
            maths / "schedules.py",
            "from ddpm_jax.fields import ",
            "from ddpm_jax.fields import Positive, ",
        )

    (block,) = examples("A loss weight")
    code, lines, after = entries(block, "WEIGHTS")
    text = (maths / "losses.py").read_text()
    table = re.search(r"^WEIGHTS.* = \{\n", text, re.M)[0]
    insert(maths / "losses.py", table, code)
    replace(maths / "losses.py", table, table + lines)
    replace(maths / "losses.py", re.search(r"^Weight = .*\n", text, re.M)[0], after)

    brightness, brightest = examples("A metric")
    metrics = copy / "ddpm_jax/metrics/quality.py"
    table = "METRICS: tuple[Callable[[Comparison], MetricValues], ...] = (\n"
    insert(metrics, table, brightness)
    replace(metrics, table, f"{table}    brightness,\n")
    insert(tasks / "sample_figures.py", "SAMPLE_EVALUATIONS = (", brightest)
    replace(
        tasks / "sample_figures.py", "SAMPLE_EVALUATIONS = (", "SAMPLE_EVALUATIONS = (brightest, "
    )

    (block,) = examples("A network")
    (copy / "ddpm_jax/nn/plain_net.py").write_text(block)

    (block,) = examples("A data set")
    (copy / "ddpm_jax/data/stripes.py").write_text(block)

    summary = launch(
        copy,
        "--experiment=ddpm_digits",
        "--config.data=stripes:12",
        "--config.task.sampling.sampler=plms2",
        "--config.task.schedule=shifted_cosine",
        "--config.task.schedule.factor=0.25",
        "--config.task.loss_weight=p2",
        "--config.task.network=plain_net",
        "--config.task.network.layers=2",
        "--config.task.evaluation.features=classifier_digits",
    )
    assert summary["data"] == "stripes 12x12"
    assert {"test/brightness", "test/brightness_error"} <= summary["metrics"].keys()
    assert (copy / "run/images/brightest.png").exists()
    config = json.loads((copy / "run/config.json").read_text())["config"]["task"]
    assert (config["network"]["type"], config["schedule"]["factor"]) == ("plain_net", 0.25)


@pytest.mark.slow
def test_the_experiment_of_the_guide_trains_its_sweep(copy):
    (block,) = examples("An experiment")
    (copy / "experiments/beta_digits.py").write_text(block)
    summary = launch(copy, "--experiment=beta_digits")
    assert set(summary["runs"]) == {"beta_0.5", "beta_1", "beta_2"}


@pytest.mark.slow
def test_the_experiment_of_the_readme_trains(copy):
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r'```python\n("""A VAE with eight latents.*?)```', text, re.DOTALL)
    (copy / "experiments/vae_eight.py").write_text(block)
    summary = launch(copy, "--experiment=vae_eight")
    assert summary["experiment"] == "vae_eight"
