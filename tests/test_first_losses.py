"""The first 20 losses and four samples of every experiment equal those in the record."""

import base64
import json

import numpy as np
import pytest

from first_losses import EXPERIMENTS, RECORD, ROOT, decoded, differences, machine, measure

FAST = ("vae_digits", "ddpm_digits", "text_encoder_shapes")
# Factor of the tolerances on another machine or with other versions: the last bits of products
# differ there, and the differences grow with the steps.
OTHER_MACHINE = 100.0


def with_samples(parts, images):
    encoded = {
        "shape": images.shape,
        "float32": base64.b64encode(images.astype("<f4").tobytes()).decode(),
    }
    return {**parts, "beta_4": {**parts["beta_4"], "samples": encoded}}


def record():
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("first_losses")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in EXPERIMENTS],
)
def test_an_experiment_trains_to_the_losses_in_its_record(name, folder):
    recorded = record()
    same = recorded["machine"] == machine()
    measured = measure(name, folder)
    assert not differences(
        name, recorded["experiments"][name], measured, 1.0 if same else OTHER_MACHINE
    )


def test_every_experiment_has_a_record():
    files = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
    assert files == EXPERIMENTS.keys() == record()["experiments"].keys()
    for parts in record()["experiments"].values():
        for part in parts.values():
            assert len(part["losses"]) == 20
            assert part["samples"] is None or len(decoded(part["samples"])) == 4


def test_the_differences_name_each_loss_sample_or_part_that_differs():
    name = "beta_vae_mnist"
    old = record()["experiments"][name]
    assert differences(name, old, old) == []
    new = json.loads(json.dumps(old))
    new["beta_4"]["losses"][7] *= 1 + 3e-5
    (line,) = differences(name, old, new)
    assert "beta_4: the loss of step 8 is" in line
    new["beta_4"]["losses"][7] = float("nan")
    assert "beta_4: the loss of step 8 is nan" in differences(name, old, new)[0]
    images = decoded(old["beta_4"]["samples"])
    assert not differences(name, old, with_samples(old, images + np.float32(5e-4)))
    new = with_samples(old, images + np.float32(2e-3))
    assert "samples differ by up to" in differences(name, old, new)[0]
    assert "its parts are" in differences(name, old, {"beta_4": old["beta_4"]})[0]
