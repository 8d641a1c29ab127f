"""The Inception network, compared with that of torch-fidelity."""

import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.metrics.pth import read_tensors
from ddpm_jax.nn.inception import Inception, from_torch, resize


@pytest.fixture(scope="module")
def state():
    """Random weights under their PyTorch names, scaled to keep activations of order 1."""
    expected = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.default_rng(0)
    arrays = {}
    for name, layer in expected["params"].items():
        shape = layer["kernel"].shape
        if name == "fc":
            arrays["fc.weight"] = rng.normal(size=shape[::-1]) / shape[0] ** 0.5
            arrays["fc.bias"] = rng.normal(size=shape[1])
            continue
        height, width, inputs, outputs = shape
        std = (2 / (height * width * inputs)) ** 0.5
        arrays[f"{name}.conv.weight"] = rng.normal(0, std, (outputs, inputs, height, width))
        arrays[f"{name}.bn.weight"] = rng.uniform(0.8, 1.2, outputs)
        arrays[f"{name}.bn.bias"] = rng.normal(0, 0.1, outputs)
        arrays[f"{name}.bn.running_mean"] = rng.normal(0, 0.1, outputs)
        arrays[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, outputs)
    return {key: value.astype(np.float32) for key, value in arrays.items()}


@pytest.fixture
def fidelity(monkeypatch):
    """Import a module of torch-fidelity without its `__init__`, which requires torchvision."""
    pytest.importorskip("torch")
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch_fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return lambda name: importlib.import_module(f"torch_fidelity.{name}")


def test_resizing_equals_that_of_tensorflow(fidelity):
    torch = importlib.import_module("torch")
    interpolate = fidelity(
        "interpolate_compat_tensorflow"
    ).interpolate_bilinear_2d_like_tensorflow1x
    for shape in ((1, 32, 32, 3), (2, 28, 28, 1), (1, 1, 7, 3), (1, 299, 299, 3), (1, 400, 301, 1)):
        images = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
        channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
        expected = (
            interpolate(channels_first, (299, 299), align_corners=False).permute(0, 2, 3, 1).numpy()
        )
        np.testing.assert_allclose(resize(jnp.asarray(images)), expected, atol=1e-4)


def test_resizing_samples_pixel_i_at_i_times_length_over_side():
    ramp = jnp.broadcast_to(jnp.arange(32.0).reshape(1, 32, 1, 1), (1, 32, 64, 1))
    expected = np.minimum(np.arange(299) * 32 / 299, 31)
    np.testing.assert_allclose(resize(ramp)[0, :, 5, 0], expected, rtol=1e-5, atol=1e-5)
    transposed = resize(jnp.swapaxes(ramp, 1, 2))
    np.testing.assert_allclose(transposed[0, 5, :, 0], expected, rtol=1e-5, atol=1e-5)


def test_inception_equals_that_of_torch_fidelity(fidelity, state, tmp_path):
    torch = importlib.import_module("torch")
    path = tmp_path / "inception.pth"
    weights = {key: torch.from_numpy(value) for key, value in state.items()}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    extractor = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "it", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    params = from_torch(read_tensors(path))
    for shape in ((2, 32, 32, 3), (1, 50, 31, 3)):
        images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        images[0] //= 3
        expected = [a.numpy() for a in extractor(torch.from_numpy(images).permute(0, 3, 1, 2))]
        actual = jax.jit(Inception().apply)(params, jnp.asarray(images, jnp.float32))
        assert [a.shape for a in actual] == [(shape[0], 2048), (shape[0], 1008)]
        for a, b in zip(actual, expected, strict=True):
            assert 0.01 < b.std() < 100
            assert np.abs(a - b).max() < 2e-5 * np.abs(b).max()
        if shape[0] == 2:  # the features differ between images
            assert np.abs(expected[0][0] - expected[0][1]).mean() > 0.05 * expected[0].std()


def test_a_grey_channel_is_repeated_and_other_numbers_of_channels_raise_an_error(state):
    params = from_torch(state)
    extract = jax.jit(Inception().apply)
    grey = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1)), jnp.float32)
    features, logits = extract(params, grey)
    assert features.dtype == logits.dtype == jnp.float32
    repeated = extract(params, jnp.repeat(grey, 3, -1))[0]
    np.testing.assert_allclose(features, repeated, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="4 channels: Inception requires 1 or 3"):
        jax.eval_shape(Inception().apply, params, jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize("key", ["Mixed_6c.branch7x7_2.bn.running_var", "fc.weight"])
def test_a_missing_or_misshapen_weight_is_named_in_an_error_of_one_line(state, key):
    without = {name: value for name, value in state.items() if name != key}
    for wrong, word in ((without, "has no array"), ({**state, key: np.zeros((2, 2))}, "(2, 2)")):
        with pytest.raises(UserError) as caught:
            from_torch(wrong)
        assert f'"{key}"' in str(caught.value)
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)


def test_from_torch_merges_batch_normalisation_into_convolutions_and_ignores_unused_arrays(state):
    name = "Mixed_5b.branch5x5_2"
    gamma, beta, mean, variance = (
        state[f"{name}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    extra = {**state, "AuxLogits.fc.bias": np.zeros(3)}
    del extra["fc.bias"]
    layer = from_torch(extra)["params"][name]
    x = np.random.default_rng(0).normal(size=(5, 5, 48))
    before = np.einsum("oihw,hwi->o", state[f"{name}.conv.weight"], x)
    after = np.einsum("hwio,hwi->o", layer["kernel"], x) + layer["bias"]
    expected = (before - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)
