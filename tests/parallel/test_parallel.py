"""A run has the same results on any number of devices, in any mode, with accumulated gradients."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import override, replace
from ddpm_jax.data import loader, types
from ddpm_jax.data.types import Batch, DataInfo, info_of
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.requests import Request
from ddpm_jax.experiment.types import Config, Dataset, bind, checked_task, with_parts
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.parallel import sharding
from ddpm_jax.parallel.fully_sharded import partition, prime_factors
from ddpm_jax.parallel.xla_flags import LATE_GATHERS, compiler_options
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import LossOutput, Variables
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.training import step as step_module
from ddpm_jax.training.checkpoint import open_checkpoints
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train
from helpers.launching import ROOT
from helpers.sampling import evaluated, sample
from helpers.tasks import SmallTask

MODES = sharding.MODES
STEPS, BATCH = 20, 16


@dataclasses.dataclass(frozen=True)
class Contrastive(SmallTask):
    """A task with a loss that compares examples (CLIP's, of two noisy copies of each image).

    It has dropout and statistics.  8 devices divide the parameters' sizes of 64 and 24, 2 devices
    that of 10, and only 1 that of 1.
    """

    def init(self, key, batch):
        key_in, key_out = jax.random.split(key)
        params = {
            "in": jax.random.normal(key_in, (64, 24)) / 8,
            "out": jax.random.normal(key_out, (24, 10)) / 5,
            "bias": jnp.zeros(10),
            "scale": jnp.ones(1),
        }
        return Variables(params, {"mean": jnp.zeros(10), "last": jnp.zeros(())})

    def features(self, params, x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        hidden = jnp.tanh((x + 0.1 * noise) @ params["in"])
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (24,)))(keys)
        features = jnp.where(mask, hidden / 0.8, 0) @ params["out"] + params["bias"]
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    def loss(self, variables, batch, keys, *, train, all_gather):
        params, extra = variables
        x = batch.images.reshape(len(batch.images), -1) / jnp.asarray(8.0, params["in"].dtype)
        keys = jax.vmap(jax.random.split)(keys)
        first = self.features(params, x, keys[:, 0])
        second = self.features(params, x, keys[:, 1])
        logits = 5 * params["scale"] * first @ all_gather(second).T
        position = batch.index % logits.shape[1]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), position[:, None], 1)[:, 0]
        losses += 0.1 * extra["mean"].sum()
        return LossOutput(losses, {"first": first[:, 0]}, {"features": first})

    def update_extra(self, extra, statistics):  # the order of the examples matters
        mean = 0.9 * extra["mean"] + 0.1 * statistics["features"].mean(0)
        return {"mean": mean, "last": statistics["features"][-1, 0]}


class Independent(Contrastive):
    """The same without the comparison, so that gradients can be accumulated."""

    def loss(self, variables, batch, keys, *, train, all_gather):
        def first(rows):
            return jax.lax.stop_gradient(rows[:1])

        batch = batch._replace(index=jnp.arange(len(keys)))
        return super().loss(variables, batch, keys, train=train, all_gather=first)


@functools.cache
def images():
    return loader.load("digits").train.images


def batch_of(step, size=BATCH):
    rows = np.arange(step * size, (step + 1) * size) % len(images())
    return Batch(images()[rows], np.zeros(size, np.int32), np.arange(size, dtype=np.int32))


CONFIG = Config(
    Dataset("digits"),
    VAE(),  # not used by these tests
    Adam(learning_rate=3e-3, grad_clip_norm=1.0, weight_decay=0.1),
    EMA(half_life_images=100.0),
    Train(batch_size=BATCH),
)


def start_of(task, config, double):
    state = step_module.init_state(task, config, batch_of(0), 0)
    return jax.tree.map(
        lambda a: np.asarray(a, np.float64 if double and a.dtype == jnp.float32 else None), state
    )


def trained(task, config, mode, count, double=True, steps=STEPS):
    """Return (losses, state) after `steps` steps on `count` devices."""
    with jax.enable_x64(double):
        partitioner = sharding.make(mode, jax.devices()[:count])
        state = partitioner.place(start_of(task, config, double))

        def step(state, batch, collectives):
            return step_module.train_step(task, config, 0, state, batch, collectives=collectives)

        size = config.train.batch_size
        first = partitioner.feed(batch_of(0, size))
        call = partitioner.lower(step, partitioner.abstract_state(state), first)()
        losses = []
        for number in range(steps):
            state, metrics = call(state, partitioner.feed(batch_of(number, size)))
            losses.append(float(metrics["loss"]))
        return np.array(losses), jax.device_get(state)


@functools.cache
def on_one_device(double):
    return trained(Contrastive(), CONFIG, "jit", 1, double)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_run_is_the_same_on_any_number_of_devices_in_any_mode(mode, count):
    losses, state = trained(Contrastive(), CONFIG, mode, count)
    expected, expected_state = on_one_device(True)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-8)
    chex.assert_trees_all_close(state, expected_state, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_losses_in_float32_are_the_same_on_eight_devices(mode):
    losses, _ = trained(Contrastive(), CONFIG, mode, 8, double=False)
    np.testing.assert_allclose(losses, on_one_device(False)[0], rtol=0, atol=1e-3)


def tiny(name, **texts):
    """Return the config of a --debug run of digits, with fields as on the command line."""
    experiment = load_experiment(name)
    texts = {path.replace("__", "."): text for path, text in texts.items()}
    texts |= {"train.batch_size": str(BATCH)}
    config = override(experiment.config, texts, experiment.debug, experiment.alternatives)
    return bind(config, info_of(loader.load("digits")))


def tiny_ddpm(**changes):
    sizes = dict(patch="4", width="16", depth="1", heads="2", dropout="0.2")
    small = {f"task__network__{name}": text for name, text in sizes.items()}
    return tiny("ddpm_digits", task__network="dit", task__schedule__steps="10", **small, **changes)


@functools.cache
def diffusion(mode, count):
    config = tiny_ddpm(task__times="importance", optimizer="muon")
    return trained(checked_task(config), config, mode, count)


@pytest.mark.parametrize("mode", MODES)
def test_diffusion_with_dropout_and_importance_sampled_times_is_the_same_on_eight_devices(mode):
    losses, state = diffusion(mode, 8)
    expected, expected_state = diffusion("jit", 1)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)  # norms are computed in float32
    chex.assert_trees_all_close(state.extra, expected_state.extra, atol=1e-5)


@pytest.mark.parametrize(("mode", "count"), [("jit", 1), ("jit", 2), ("pmap", 4), ("fsdp", 2)])
def test_accumulated_gradients_equal_those_of_the_whole_batch(mode, count):
    task = Independent()
    expected, expected_state = trained(task, CONFIG, "jit", 1)
    config = replace(CONFIG, {"train.grad_accum_steps": 4})
    losses, state = trained(task, config, mode, count)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-8)
    chex.assert_trees_all_close(state, expected_state, rtol=0, atol=1e-8)


TOLERANCE = 0.05  # relative to the float32 run's mean loss over the same 20 steps


@pytest.mark.parametrize(
    "experiment", ["vae_digits", pytest.param("ddpm_digits", marks=pytest.mark.slow)]
)
def test_the_loss_of_a_bfloat16_run_is_close_to_that_of_a_float32_run(experiment):
    """Train for 200 steps with the same random numbers; state and losses stay float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        changes = {}
        if experiment == "ddpm_digits":
            sizes = dict(patch="2", width="32", depth="2", heads="2")
            changes = {f"task__network__{name}": text for name, text in sizes.items()}
            changes["task__network"] = "dit"
        config = tiny(experiment, train__precision=precision, **changes)
        values, state = trained(checked_task(config), config, "jit", 1, False, steps=200)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}
        losses[precision] = values.reshape(10, 20).mean(1)
    assert (losses["float32"] != losses["bfloat16"]).any()
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=TOLERANCE)


def test_gradients_of_a_loss_that_compares_examples_are_not_accumulated():
    with pytest.raises(UserError, match="compares the examples"):
        trained(Contrastive(), replace(CONFIG, {"train.grad_accum_steps": 2}), "jit", 1)


def test_a_batch_size_that_does_not_divide_over_devices_and_parts_raises_an_error():
    with pytest.raises(UserError, match=r"must be a multiple of 8, .* over 8 devices$"):
        sharding.check_batch(12)
    with pytest.raises(UserError, match=r"must be a multiple of 24, .* over 8 devices x 3 parts$"):
        sharding.check_batch(16, 3)


# Shardings of arrays.

EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))


def shapes_of(name):
    experiment, data = load_experiment(name), name.split("_")[-1]
    if experiment.several:
        pytest.skip("trains tasks of other experiments")
    sides = {"cifar10": (32, 32, 3), "mnist": (28, 28, 1), "shapes": (32, 32, 3)}
    length = 96 if data == "shapes" else 0
    info = DataInfo(data, sides.get(data, (8, 8, 1)), 256, 0 if length else 10, length)
    config = bind(experiment.config, info)
    if experiment.config.task.needs().autoencoder:
        parts = ("text_encoder_shapes", "autoencoder_shapes")
        config = with_parts(config, *(bind(load_experiment(part).config, info) for part in parts))
    return step_module.state_shapes(checked_task(config), config, info.shape)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_under_fsdp_each_device_holds_its_share(name):
    shapes = shapes_of(name)
    for count in (2, 4, 8):
        partitioner = sharding.make("fsdp", jax.devices()[:count])
        shardings = partitioner.shardings(shapes)
        parts = jax.tree.map(lambda a, s: np.prod(s.shard_shape(a.shape)), shapes, shardings)
        held = sum(jax.tree.leaves(parts))
        assert held <= 1.05 * sum(a.size for a in jax.tree.leaves(shapes)) / count


@dataclasses.dataclass(frozen=True)
class Deep(SmallTask):
    """A task with many more parameters than activations, computed in `dtype`."""

    dtype: str = "float32"
    layers: int = 12
    width: int = 256

    def init(self, key, batch):
        keys, shape = jax.random.split(key, self.layers), (self.width, self.width)
        return Variables([jax.random.normal(key, shape) / self.width**0.5 for key in keys], {})

    def loss(self, variables, batch, keys, *, train, all_gather):
        x = jnp.tile(batch.images.reshape(len(batch.images), -1), self.width // 64)
        x = x.astype(self.dtype)
        for weights in variables.params:
            x = jnp.tanh(x @ weights.astype(self.dtype))
        return LossOutput(jnp.square(x).mean(-1).astype(jnp.float32), {}, {})


@pytest.mark.skipif(
    compiler_options(LATE_GATHERS) is None,
    reason="XLA for CPUs gathers early in other versions (xla_flags.py, LATE_GATHERS)",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_fsdp_a_step_never_holds_the_whole_model(dtype):
    """In addition to its part, a device holds 2 of 12 layers and their gradient at a time."""
    task, partitioner = Deep(dtype=dtype), sharding.make("fsdp")
    shapes = step_module.state_shapes(task, CONFIG, (8, 8, 1))

    def step(state, batch, collectives):
        return step_module.train_step(task, CONFIG, 0, state, batch, collectives=collectives)

    program = partitioner.lower(
        step, partitioner.abstract_state(shapes), partitioner.feed(batch_of(0))
    )()
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes.params))
    assert program.memory_analysis().temp_size_in_bytes < total / 3


def test_an_array_is_partitioned_across_as_many_devices_as_its_axes_allow():
    factors, axes = prime_factors(8), ("a", "b", "c")
    assert factors == (2, 2, 2)
    assert partition((500, 20), factors, axes) == jax.P(("a", "b"), "c")
    assert partition((3, 5), factors, axes) == jax.P(None, None)
    assert prime_factors(12) == (3, 2, 2)
    assert partition((9, 4), (3, 2, 2), axes) == jax.P("a", ("b", "c"))


def test_the_state_is_donated_in_every_mode():
    for mode in MODES:
        partitioner = sharding.make(mode)
        state = partitioner.place({"w": jnp.arange(16.0)})

        def step(state, batch, collectives):
            return {"w": state["w"] + 1}, {}

        batch = partitioner.feed(np.zeros(8, np.float32))
        call = partitioner.lower(step, partitioner.abstract_state(state), batch)()
        call(state, batch)
        assert state["w"].is_deleted()


LAYOUTS = [("jit", 1), ("pmap", 4), ("fsdp", 2), ("fsdp", 8)]


def test_a_checkpoint_of_any_layout_is_restored_into_any_other(tmp_path):
    task = Contrastive()
    start = step_module.init_state(task, CONFIG, batch_of(0), 0)
    for index, (mode, count) in enumerate(LAYOUTS):
        partitioner = sharding.make(mode, jax.devices()[:count])
        checkpoints = open_checkpoints(tmp_path / str(index))
        checkpoints.save(1, partitioner.place(start), {"window": {}})
        checkpoints.close()
        for mode, count in LAYOUTS:
            target = sharding.make(mode, jax.devices()[:count])
            checkpoints = open_checkpoints(tmp_path / str(index), read_only=True)
            like = target.abstract_state(jax.eval_shape(lambda: start))
            step, restored, _ = checkpoints.restore_newest(like)
            checkpoints.close()
            assert step == 1
            chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(start))
            assert jax.tree.map(lambda a: a.sharding, restored) == target.shardings(start)


# Evaluation and sampling.


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_includes_every_example_once_on_any_number_of_devices(mode):
    split = types.Split(np.arange(21, dtype=np.uint8).reshape(21, 1, 1, 1), np.zeros(21, np.int32))
    partitioner = sharding.make(mode, jax.devices()[:8])

    @jax.jit
    def fn(batch, keys):
        noise = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        return {"value": batch.images[:, 0, 0, 0], "noise": noise}

    values = per_example(fn, split, 5, 0, partitioner)
    np.testing.assert_array_equal(values["value"], np.arange(21))
    expected = per_example(fn, split, 5, 0, sharding.make("jit", jax.devices()[:1]))
    np.testing.assert_array_equal(values["noise"], expected["noise"])


@pytest.mark.parametrize("mode", ["jit", "fsdp"])  # pmap differs from jit only in the training step
def test_sampled_images_are_the_same_on_eight_devices(mode):
    config = tiny_ddpm()
    task = checked_task(config)
    params = start_of(task, config, False).params

    def sampled(mode, count):
        partitioner = sharding.make(mode, jax.devices()[:count])
        keys = example_keys(purpose_key(0, SAMPLE), 0, partitioner.indices(0, 16))
        variables = Variables(partitioner.place(params), {})
        return sharding.fetch(sample(task, variables, keys, Request(steps=2)))

    np.testing.assert_allclose(sampled(mode, 8), sampled("jit", 1), atol=1e-5)


@pytest.mark.parametrize("mode", [pytest.param("jit", marks=pytest.mark.slow), "fsdp"])
def test_an_evaluation_is_the_same_on_eight_devices(mode):
    config = tiny("vae_digits")
    task = checked_task(config)
    data = loader.load("digits")
    data = data._replace(test=data.test.first(40))
    params = start_of(task, config, False).params

    def evaluated_on(mode, count):
        partitioner = sharding.make(mode, jax.devices()[:count])
        variables = Variables(partitioner.place(params), {})
        return evaluated(task, variables, data, full=False, partitioner=partitioner)

    expected, result = evaluated_on("jit", 1), evaluated_on(mode, 8)
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
