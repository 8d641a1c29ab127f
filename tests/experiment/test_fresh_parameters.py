"""A run that was trained further is loaded anew, for example in an open notebook."""

import json
import shutil

import jax
import numpy as np
import pytest

import ddpm_jax
import launch
from ddpm_jax.data.loader import load
from ddpm_jax.data.types import Loaded
from ddpm_jax.experiment import guidance_models
from ddpm_jax.experiment.recorded import read_model

FIELDS = {
    "train.eval_every": "0", "train.checkpoint_every": "0", "train.batch_size": "8",
    "task.network": "dit", "task.network.width": "16", "task.network.depth": "1",
    "task.evaluation.num_samples": "2", "task.evaluation.times_per_image": "1",
    "task.sampling.steps": "2",
}  # fmt: skip


def train(workdir, steps):
    """Train a tiny diffusion run to a number of steps, in this process."""
    flags = [f"--config.{path}={value}" for path, value in FIELDS.items()]
    command = ["--experiment=ddpm_digits", "--debug", f"--workdir={workdir}"]
    assert launch.report([*command, *flags, f"--config.train.steps={steps}"]) == 0


def equal(params, others):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True)
    return all(np.array_equal(first, second) for first, second in pairs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run of a guidance model, and a copy of this run that is guided by it."""
    directory = tmp_path_factory.mktemp("fresh")
    model, guided = directory / "model", directory / "guided"
    train(model, 1)
    shutil.copytree(model, guided)
    record = json.loads((guided / "config.json").read_text())
    record["config"]["task"]["sampling"]["guidance_model"] = str(model)
    (guided / "config.json").write_text(json.dumps(record))
    return model, guided


def test_a_guidance_model_that_was_trained_further_has_its_new_parameters(runs, monkeypatch):
    model, guided = runs
    loads = []
    load_state = guidance_models.load_state
    monkeypatch.setattr(guidance_models, "load_state", lambda *a: loads.append(a) or load_state(*a))
    first = ddpm_jax.load_run(guided)
    images = first.sample(2, guidance=3.0)
    assert equal(first.guidance_model.params, ddpm_jax.load_run(model).variables.params)
    np.testing.assert_array_equal(first.sample(2, guidance=3.0), images)
    assert len(loads) == 1  # a run loads its guidance model once
    config, loaded = read_model(guided).run_config, Loaded(load("digits"))
    for _ in range(3):  # as when the runs of a sweep are checked
        assert guidance_models.check_guidance(config, loaded) == config
    assert len(loads) == 2

    train(model, 2)
    assert guidance_models.check_guidance(config, loaded) == config
    assert len(loads) == 3
    again = ddpm_jax.load_run(guided)
    assert equal(again.guidance_model.params, ddpm_jax.load_run(model).variables.params)
    assert not equal(again.guidance_model.params, first.guidance_model.params)
    assert "step 2" in again.guidance_model.about
    assert not np.array_equal(again.sample(2, guidance=3.0), images)
    assert len(loads) == 4
