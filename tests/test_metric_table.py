"""Every metric that the code computes is in the table of docs/metrics.md."""

import ast
import re

import numpy as np
import pytest

from ddpm_jax.data.types import Data, Split
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.noise_levels import noise_levels
from ddpm_jax.metrics.quality import quality
from ddpm_jax.parallel import hardware
from ddpm_jax.progress import Clock
from ddpm_jax.tasks.vae import importance_weighted
from helpers.launching import ROOT
from helpers.metric_table import PLACEHOLDERS, pattern, rows, undefined

FOLDERS = ("tasks", "metrics", "training")
VARIABLES = {"metrics", "means"}  # names of variables that hold metrics
EXAMPLES = {"t": "0.3", "k": "64", "n": "64", "prompts": "single", "scale": "1.5"}


def keys_of(node):
    """Yield the keys of the dictionaries in an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            yield from part.keys
        elif isinstance(part, ast.DictComp):
            yield part.key


def named(node):
    """Yield the expressions in a statement or a call that are names of metrics."""
    if isinstance(node, ast.Call):
        function = getattr(node.func, "id", "")
        if function in ("averages", "with_error", "Evaluation") and node.args:
            first = node.args[0]
            yield from keys_of(first) if isinstance(first, ast.Dict | ast.DictComp) else [first]
        elif function == "LossOutput":
            yield from keys_of(node.args[1])
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        variable = target.value if isinstance(target, ast.Subscript) else target
        if getattr(variable, "id", "") in VARIABLES:
            if isinstance(target, ast.Subscript):
                yield target.slice
            elif isinstance(node.value, ast.Dict | ast.DictComp | ast.BinOp):
                yield from keys_of(node.value)


def expression(node):
    """Return the regular expression of a string, or None if the node is not a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        literals = (getattr(part, "value", None) for part in node.values)
        return "".join(re.escape(text) if isinstance(text, str) else ".+" for text in literals)
    return None


def names_of_source():
    """Return {regular expression: file} of the names of metrics in the source code."""
    names = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / "ddpm_jax" / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                for name in filter(None, map(expression, named(node))):
                    names[name] = path.name
    return names


def test_the_names_of_metrics_in_the_source_code_are_in_the_table():
    names = names_of_source()
    assert len(names) > 30, names
    table = [
        re.sub(r"<(\w+)>", lambda match: EXAMPLES.get(match[1], "network"), row) for row in rows()
    ]
    missing = {
        name: path
        for name, path in names.items()
        if not any(re.fullmatch(rf"(?:train/)?{name}", f"{prefix}{row}")
                   for row in table for prefix in ("", "train/"))
    }  # fmt: skip
    assert not missing


def test_the_table_has_each_name_once_and_only_names_of_the_code():
    names = rows()
    assert len(set(names)) == len(names) > 60
    text = "".join(path.read_text() for path in (ROOT / "ddpm_jax").rglob("*.py"))
    text += (ROOT / "experiments/noise_in_sampling.py").read_text()
    words = set(re.findall(r"[a-z]+", text))
    unknown = [
        name for name in names if not words >= set(re.findall(r"[a-z]+", re.sub("<.*?>", "", name)))
    ]
    assert not unknown


@pytest.mark.parametrize("name", ["classifier_digits", "inception"])
def test_the_metrics_of_samples_are_in_the_table(name):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (60, 4, 4, 1)).astype(np.uint8)
    labels = np.arange(60, dtype=np.int32) % 3
    train, test = Split(images[:40], labels[:40]), Split(images[40:], labels[40:])
    data = Data("x", "x", train, test, 17, ("a", "b", "c"), "")

    def compute_features(images):
        features = images.reshape(len(images), -1)[:, :3].astype(np.float64)
        return features, np.log(np.exp(features) / np.exp(features).sum(1, keepdims=True))

    samples = rng.uniform(-1, 1, (50, 4, 4, 1)).astype(np.float32)
    metrics = quality(
        FeatureNetwork(name, compute_features), samples, np.arange(50) % 3, data
    ).metrics
    assert len(metrics) > 15
    assert not undefined(f"test/{metric}" for metric in metrics)


def test_metrics_of_noise_levels_and_importance_weighted_bounds_are_in_the_table():
    rng = np.random.default_rng(0)
    terms = {name: rng.uniform(size=(40, 8)) for name in ("t", "mse", "kl", "distortion")}
    metrics, _ = noise_levels(terms, 64)
    metrics |= importance_weighted(rng.normal(size=(3, 1000)))
    assert len(metrics) > 40
    assert not undefined(f"test/{metric}" for metric in metrics)


def test_the_values_of_the_clock_and_of_the_hardware_are_in_the_table():
    clock = Clock(0, 10, show=False)
    for activity in ("evaluation", "checkpoint"):
        with clock.pause(activity):
            pass
    lap = clock.lap(1)
    assert len(lap) == 5
    assert not undefined({**lap, **hardware.utilisation(1.0, lap), **hardware.memory()})


def test_a_name_that_is_not_in_the_table_is_reported():
    names = ["test/fd_x", "test/fd_x_ratio", "test/guidance_1.5/fd_x_error", "train/loss", "step"]
    assert not undefined(names)
    wrong = ["test/los", "test/mse_t_3", "test/guidance_a/fd_x", "val/loss"]
    assert undefined(wrong) == ["los", "mse_t_3", "guidance_a/fd_x", "val/loss"]
    assert set(EXAMPLES) | {"network"} == set(PLACEHOLDERS)
    assert re.fullmatch(pattern("aligned_<prompts>"), "aligned_relation_held_out")
