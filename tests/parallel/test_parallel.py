"""One run is the same run however it is spread: over devices, over modes, over parts of a batch."""

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
from ddpm_jax.parallel.fully_sharded import prime_factors, split
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
    """A loss that compares examples (CLIP's, of two noisy views), dropout, and statistics.

    The parameters' sizes, 64, 24, 10 and 1, are divided by 8, 4, 2 devices or by none.
    """

    def init(self, key, batch):
        one, two = jax.random.split(key)
        params = {
            "in": jax.random.normal(one, (64, 24)) / 8,
            "out": jax.random.normal(two, (24, 10)) / 5,
            "bias": jnp.zeros(10),
            "scale": jnp.ones(1),
        }
        return Variables(params, {"mean": jnp.zeros(10), "last": jnp.zeros(())})

    def features(self, params, x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        hidden = jnp.tanh((x + 0.1 * noise) @ params["in"])
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (24,)))(keys)
        features = jnp.where(kept, hidden / 0.8, 0) @ params["out"] + params["bias"]
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    def loss(self, variables, batch, keys, *, train, all_gather):
        params, extra = variables
        x = batch.images.reshape(len(batch.images), -1) / jnp.asarray(8.0, params["in"].dtype)
        keys = jax.vmap(jax.random.split)(keys)
        first = self.features(params, x, keys[:, 0])
        second = self.features(params, x, keys[:, 1])
        logits = 5 * params["scale"] * first @ all_gather(second).T
        place = batch.index % logits.shape[1]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), place[:, None], 1)[:, 0]
        losses += 0.1 * extra["mean"].sum()
        return LossOutput(losses, {"first": first[:, 0]}, {"features": first})

    def update_extra(self, extra, statistics):  # the order of the examples matters
        mean = 0.9 * extra["mean"] + 0.1 * statistics["features"].mean(0)
        return {"mean": mean, "last": statistics["features"][-1, 0]}


class AloneOfComparing(Contrastive):
    """The same without the comparison, which cannot be taken in parts."""

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
    VAE(),  # which these tests do not build
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
    """(losses, state) after some steps on `count` devices."""
    with jax.enable_x64(double):
        partitioner = sharding.make(mode, jax.devices()[:count])
        state = partitioner.place(start_of(task, config, double))

        def step(state, batch, collectives):
            return step_module.train_step(task, config, 0, state, batch, collectives=collectives)

        size = config.train.batch_size
        first = partitioner.feed(batch_of(0, size))
        call = partitioner.lower(step, partitioner.like(state), first)()
        losses = []
        for number in range(steps):
            state, found = call(state, partitioner.feed(batch_of(number, size)))
            losses.append(float(found["loss"]))
        return np.array(losses), jax.device_get(state)


@functools.cache
def on_one_device(double):
    return trained(Contrastive(), CONFIG, "jit", 1, double)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_run_is_the_same_on_any_number_of_devices_in_any_mode(mode, count):
    losses, state = trained(Contrastive(), CONFIG, mode, count)
    expected, alone = on_one_device(True)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-8)
    chex.assert_trees_all_close(state, alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_losses_in_float32_are_the_same_on_eight_devices(mode):
    losses, _ = trained(Contrastive(), CONFIG, mode, 8, double=False)
    np.testing.assert_allclose(losses, on_one_device(False)[0], rtol=0, atol=1e-3)


def tiny(name, **texts):
    """The config of a --debug run of digits, with some fields of the command line's."""
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
    expected, alone = diffusion("jit", 1)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)  # norms are of float32
    chex.assert_trees_all_close(state.extra, alone.extra, atol=1e-5)


@pytest.mark.parametrize(("mode", "count"), [("jit", 1), ("jit", 2), ("pmap", 4), ("fsdp", 2)])
def test_a_batch_taken_in_parts_is_the_large_batch(mode, count):
    task = AloneOfComparing()
    expected, whole = trained(task, CONFIG, "jit", 1)
    config = replace(CONFIG, {"train.grad_accum_steps": 4})
    losses, state = trained(task, config, mode, count)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-8)
    chex.assert_trees_all_close(state, whole, rtol=0, atol=1e-8)


BAND = 0.05  # of the float32 run's mean loss over the same 20 steps


@pytest.mark.parametrize(
    "experiment", ["vae_digits", pytest.param("ddpm_digits", marks=pytest.mark.slow)]
)
def test_a_bfloat16_run_follows_the_float32_runs_loss(experiment):
    """Over 200 steps of the same draws; what is kept and reported stays float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        changes = {}
        if experiment == "ddpm_digits":
            sizes = dict(patch="2", width="32", depth="2", heads="2")
            changes = {f"task__network__{name}": text for name, text in sizes.items()}
            changes["task__network"] = "dit"
        config = tiny(experiment, train__precision=precision, **changes)
        found, state = trained(checked_task(config), config, "jit", 1, False, steps=200)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}
        losses[precision] = found.reshape(10, 20).mean(1)
    assert (losses["float32"] != losses["bfloat16"]).any()
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=BAND)


def test_a_loss_that_compares_examples_is_not_taken_in_parts():
    with pytest.raises(UserError, match="compares the examples"):
        trained(Contrastive(), replace(CONFIG, {"train.grad_accum_steps": 2}), "jit", 1)


def test_a_batch_that_devices_or_parts_do_not_divide_is_refused():
    with pytest.raises(UserError, match="does not divide over 8 devices; give a multiple of 8"):
        sharding.check_batch(12)
    with pytest.raises(UserError, match="8 devices x 3 parts; give a multiple of 24"):
        sharding.check_batch(16, 3)


# Where arrays lie.

EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))


def shapes_of(name):
    experiment, data = load_experiment(name), name.split("_")[-1]
    if experiment.several:
        pytest.skip("trains others' tasks")
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
        where = partitioner.shardings(shapes)
        parts = jax.tree.map(lambda a, s: np.prod(s.shard_shape(a.shape)), shapes, where)
        held = sum(jax.tree.leaves(parts))
        assert held <= 1.05 * sum(a.size for a in jax.tree.leaves(shapes)) / count


@dataclasses.dataclass(frozen=True)
class Deep(SmallTask):
    """Far more parameters than activations, computed with in `dtype`."""

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
    """Beside its share, a device holds two layers and their gradient at a time, of 12."""
    task, partitioner = Deep(dtype=dtype), sharding.make("fsdp")
    shapes = step_module.state_shapes(task, CONFIG, (8, 8, 1))

    def step(state, batch, collectives):
        return step_module.train_step(task, CONFIG, 0, state, batch, collectives=collectives)

    program = partitioner.lower(step, partitioner.like(shapes), partitioner.feed(batch_of(0)))()
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes.params))
    assert program.memory_analysis().temp_size_in_bytes < whole / 3


def test_an_array_is_split_over_as_many_devices_as_its_axes_allow():
    factors, axes = prime_factors(8), ("a", "b", "c")
    assert factors == (2, 2, 2)
    assert split((500, 20), factors, axes) == jax.P(("a", "b"), "c")
    assert split((3, 5), factors, axes) == jax.P(None, None)
    assert prime_factors(12) == (3, 2, 2)
    assert split((9, 4), (3, 2, 2), axes) == jax.P("a", ("b", "c"))


def test_the_state_is_donated_in_every_mode():
    for mode in MODES:
        partitioner = sharding.make(mode)
        state = partitioner.place({"w": jnp.arange(16.0)})

        def step(state, batch, collectives):
            return {"w": state["w"] + 1}, {}

        batch = partitioner.feed(np.zeros(8, np.float32))
        call = partitioner.lower(step, partitioner.like(state), batch)()
        call(state, batch)
        assert state["w"].is_deleted()


LAYOUTS = [("jit", 1), ("pmap", 4), ("fsdp", 2), ("fsdp", 8)]


def test_a_checkpoint_of_any_layout_is_restored_into_any_other(tmp_path):
    task = Contrastive()
    start = step_module.init_state(task, CONFIG, batch_of(0), 0)
    for number, (mode, count) in enumerate(LAYOUTS):
        partitioner = sharding.make(mode, jax.devices()[:count])
        checkpoints = open_checkpoints(tmp_path / str(number))
        checkpoints.save(1, partitioner.place(start), {"window": {}})
        checkpoints.close()
        for mode, count in LAYOUTS:
            other = sharding.make(mode, jax.devices()[:count])
            checkpoints = open_checkpoints(tmp_path / str(number), read_only=True)
            like = other.like(jax.eval_shape(lambda: start))
            step, found, _ = checkpoints.restore_newest(like)
            checkpoints.close()
            assert step == 1
            chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(start))
            assert jax.tree.map(lambda a: a.sharding, found) == other.shardings(start)


# Evaluation and sampling.


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_counts_every_example_once_on_any_devices(mode):
    split = types.Split(np.arange(21, dtype=np.uint8).reshape(21, 1, 1, 1), np.zeros(21, np.int32))
    partitioner = sharding.make(mode, jax.devices()[:8])

    @jax.jit
    def fn(batch, keys):
        draw = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        return {"value": batch.images[:, 0, 0, 0], "draw": draw}

    found = per_example(fn, split, 5, 0, partitioner)
    np.testing.assert_array_equal(found["value"], np.arange(21))
    alone = per_example(fn, split, 5, 0, sharding.make("jit", jax.devices()[:1]))
    np.testing.assert_array_equal(found["draw"], alone["draw"])


@pytest.mark.parametrize("mode", ["jit", "fsdp"])  # pmap is jit's but for the step
def test_drawn_images_are_the_same_on_eight_devices(mode):
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
def test_a_whole_evaluation_is_the_same_on_eight_devices(mode):
    config = tiny("vae_digits")
    task = checked_task(config)
    data = loader.load("digits")
    data = data._replace(test=data.test.first(40))
    params = start_of(task, config, False).params

    def evaluated_on(mode, count):
        partitioner = sharding.make(mode, jax.devices()[:count])
        variables = Variables(partitioner.place(params), {})
        return evaluated(task, variables, data, full=False, partitioner=partitioner)

    one, many = evaluated_on("jit", 1), evaluated_on(mode, 8)
    for name, value in one.metrics.items():
        assert many.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
