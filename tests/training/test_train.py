"""The loop: one program, one result, whatever interrupts it."""

import dataclasses
import json
import os
import random
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from ddpm_jax.config import marked, replace
from ddpm_jax.config_records import to_record
from ddpm_jax.data import batches, loader, types
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.experiment import recorded, run
from ddpm_jax.experiment.inputs import config_for
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.types import Options, bind, checked_task
from ddpm_jax.fields import MAY_CHANGE
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.parallel import sharding
from ddpm_jax.rng import TRAIN, example_keys, purpose_key
from ddpm_jax.task import Evaluation, LossOutput, Variables
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.training import ema as ema_module
from ddpm_jax.training import loop as train
from ddpm_jax.training import muon, program, records
from ddpm_jax.training import optimizer as optimizer_module
from ddpm_jax.training import step as step_module
from ddpm_jax.training.checkpoint import open_checkpoints
from ddpm_jax.training.run_dir import open_run
from ddpm_jax.variational.likelihoods import Gaussian
from helpers.runs import COMMAND, end_of, finish, start, steps_of, wait_for
from helpers.sampling import sample
from helpers.tasks import SmallTask, not_evaluated


@pytest.fixture(scope="module")
def digits():
    return loader.load("digits")


EXPERIMENT = load_experiment("vae_digits")
INFO = types.DataInfo("digits", (8, 8, 1), 17, 10)
# Adam's steps are of the size 1 under a constant gradient.
CONSTANT = optimizer_module.Adam(learning_rate=1.0)


def small(values=(), **train):
    """The debug config with batches of 16; `values` by their paths, `train` of that section."""
    train = {f"train.{name}": value for name, value in train.items()}
    values = {"train.batch_size": 16, **train, **dict(values)}
    return bind(config_for(EXPERIMENT, True, values), INFO)


def ema(**fields):
    """Moving averages, as `small` takes them."""
    return {"ema": ema_module.EMA(**fields)}


def batch_of(data, size, start=0):
    rows = slice(start, start + size)
    return types.Batch(data.train.images[rows], data.train.labels[rows], np.arange(size))


def step_of(task, config, seed=0):
    return lambda state, batch: step_module.train_step(task, config, seed, state, batch)


def fit(config, data, workdir, task=None, seed=0):
    task = task or checked_task(config)
    record = {"experiment": "test", "config": to_record(config), "seed": seed, "data": {}}
    run = open_run(workdir, record, marked(config, MAY_CHANGE))
    checkpoints = open_checkpoints(workdir / "checkpoints")
    try:
        return train.fit(task, config, data, run, checkpoints, seed, sharding.make())
    finally:
        checkpoints.close()
        run.close()


class StepsAlone(VAE):
    """A VAE without its evaluation, which takes longer than a few steps."""

    def evaluations(self):
        """One that costs nothing."""
        return (not_evaluated,)


def fit_alone(config, data, workdir, kind=StepsAlone):
    """`fit` without an evaluation at its end."""
    return fit(config, data, workdir, kind(**vars(checked_task(config))))


def test_training_looks_at_validation_images_and_only_the_end_at_test_images(digits, tmp_path):
    """The best checkpoint is the one of the lowest validation loss."""
    asked = []

    def evaluate(task, context):
        asked.append((context.split, context.full))
        return Evaluation({"loss": float([3.0, 1.0, 2.0, 0.5][len(asked) - 1])})

    class Evaluated(VAE):
        def evaluations(self):
            return (evaluate,)

    config = small(steps=8, eval_every=2, checkpoint_every=1, steps_per_call=1)
    task = Evaluated(**vars(checked_task(config)))
    result = fit(config, digits, tmp_path / "run", task)
    assert asked == [("validation", False)] * 3 + [("test", True)]
    assert result.final.metrics == {"test/loss": 0.5}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert losses == {2: 3.0, 4: 1.0, 6: 2.0}
    kept = {int(path.name) for path in (tmp_path / "run/checkpoints").glob("[0-9]*")}
    assert kept == {4, 6, 7, 8}  # the newest three and the best


@pytest.mark.parametrize("conv", [False, True])
def test_one_batch_is_overfitted(digits, conv):
    config = small({"optimizer.learning_rate": 3e-3, "optimizer.lr_schedule": "constant", **ema()})
    net = VAENetwork((8, 8, 1), 16, (16, 32) if conv else (128,), conv=conv)
    task = VAE(net, Gaussian(std=0.1), beta=0.0, eval_batch_size=16, iwae_images=1, info=INFO)
    batch = batch_of(digits, 16)
    state = step_module.init_state(task, config, batch, 0)
    step = jax.jit(step_of(task, config))
    losses = []
    for _ in range(600):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    # The error is of the size of the dequantisation noise: a bin's width / sqrt(12).
    mse = (2 * losses[-1] / 64 - np.log(2 * np.pi * 0.1**2)) * 0.1**2
    assert mse < 2 * (2 / 17) ** 2 / 12


def test_the_train_step_compiles_once(digits, tmp_path):
    traces = []
    config = small(steps=43, log_every=7, eval_every=0, checkpoint_every=10)

    class Counted(StepsAlone):
        def loss(self, *arguments, **named):
            traces.append(1)
            return super().loss(*arguments, **named)

    fit_alone(config, digits, tmp_path, Counted)
    # The calls are of 1 to 5 steps; traced for the shapes and for the loop's body, no more.
    lengths = {last - first for first, last in program.calls(0, config)}
    assert len(lengths) > 2
    assert len(traces) <= 3


def test_where_the_calls_are_cut_changes_no_bit(digits, tmp_path):
    states = []
    for number, log_every in enumerate((3, 5, 20)):
        config = small(log_every=log_every, eval_every=0, checkpoint_every=0)
        states.append(fit_alone(config, digits, tmp_path / str(number)).state)
    chex.assert_trees_all_equal(states[0], states[1], states[2])


def test_metrics_are_means_over_the_steps_since_the_last_line(digits, tmp_path):
    ones = small(log_every=1, eval_every=0, checkpoint_every=0)
    fives = small(log_every=5, eval_every=0, checkpoint_every=0)
    fit_alone(ones, digits, tmp_path / "ones")
    fit_alone(fives, digits, tmp_path / "fives")

    def lines(name):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        found = [json.loads(line) for line in text.splitlines()]
        return [line for line in found if "train/loss" in line]

    each = [line["train/loss"] for line in lines("ones")]
    assert [line["step"] for line in lines("ones")] == list(range(1, 21))
    for line in lines("fives"):
        expected = np.mean(each[line["step"] - 5 : line["step"]])
        assert line["train/loss"] == pytest.approx(expected, rel=1e-12)


def test_draws_are_keyed_by_step_and_example():
    key = purpose_key(0, TRAIN)
    whole = example_keys(key, 3, jnp.arange(8))
    part = example_keys(key, 3, jnp.array([6, 2]))
    chex.assert_trees_all_equal(
        jax.random.key_data(part), jax.random.key_data(whole)[np.array([6, 2])]
    )
    data = jax.random.key_data(jnp.stack([whole, example_keys(key, 4, jnp.arange(8))]))
    assert len(np.unique(data.reshape(16, -1), axis=0)) == 16


def test_the_average_follows_its_half_life_after_the_warm_up():
    # Late, a half-life of 1,000 images halves the old average's share in 1,000 images.
    decay = ema_module.ema_decay(10**6, 100, 1000.0)
    assert float(decay) ** 10 == pytest.approx(0.5, rel=1e-5)
    # Early, it is 5 % of the images seen.
    assert float(ema_module.ema_decay(10, 100, 1e9)) == pytest.approx(0.5 ** (1 / 0.5), rel=1e-5)


def test_a_power_averages_weights_have_the_width_that_was_asked_for():
    width, steps = 0.1, 20_000
    decays = np.asarray(ema_module.power_decay(np.arange(1, steps + 1), width), np.float64)
    weights = (1 - decays) * np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    time = np.arange(1, steps + 1) / steps
    mean = (weights * time).sum()
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


def test_several_averages_are_kept_at_once_and_one_is_chosen(digits, tmp_path):
    averages = dict(more_half_lives_images=(0.0, 100.0), power_widths=(0.1,))
    config = small(ema(half_life_images=1e6, evaluated="half_life=0", **averages))
    state = fit_alone(config, digits, tmp_path).state
    assert len(state.ema) == 4
    chex.assert_trees_all_equal(step_module.averaged(state, config), state.params)  # no averaging
    alone = fit_alone(small(ema(half_life_images=100.0)), digits, tmp_path / "alone").state
    # Two programs, which round a sum near 0 differently.
    chex.assert_trees_all_close(state.ema[2], alone.ema[0], rtol=1e-6, atol=1e-9)
    names = "first, half_life=1000000, half_life=0, half_life=100, power=0.1"
    with pytest.raises(UserError, match=f'there is no average "power=0.2"; there are: {names}$'):
        recorded.check_average(replace(config, {"ema.evaluated": "power=0.2"}))


def test_the_record_says_which_parameters_were_used():
    averages = ema_module.EMA(20_000.0, (0.0, 500.0), (0.05,))
    assert averages.names == ("half_life=20000", "half_life=0", "half_life=500", "power=0.05")
    used = [
        ema_module.parameters_used(dataclasses.replace(averages, evaluated=name))
        for name in ("first", *averages.names)
    ]
    assert used == [
        "EMA, half-life 20000 images",
        "EMA, half-life 20000 images",
        "as trained",
        "EMA, half-life 500 images",
        "power EMA, width 0.05",
    ]


def test_the_learning_rate_warms_up_and_decays():
    settings = optimizer_module.Adam(learning_rate=0.5, warmup_steps=10, lr_schedule="cosine")
    params = {"x": jnp.zeros(1)}
    optimizer = optimizer_module.make_optimizer(settings, steps=100)
    state = optimizer.init(params)
    sizes = []
    for _ in range(100):  # Adam's step under a constant gradient is the learning rate
        updates, state = optimizer.update({"x": jnp.ones(1)}, state, params)
        sizes.append(-float(updates["x"][0]))
    expected = [
        0.5 * min(1, (i + 1) / 10) * 0.5 * (1 + np.cos(np.pi * i / 100)) for i in range(100)
    ]
    np.testing.assert_allclose(sizes, expected, rtol=1e-4)


def test_muon_takes_kernels_as_matrices_and_adam_the_rest():
    draws = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(draws.normal(size=shape), jnp.float32)

    inner = {"kernel": drawn(3, 3, 2, 16), "bias": drawn(16)}
    scanned = {"kernel": drawn(5, 12, 8)}
    params = {"params": {"conv_in": {"kernel": drawn(3, 3, 1, 8)}, "a": inner, "b": {"c": scanned}}}
    made_of = optimizer_module.make_optimizer(optimizer_module.Muon(learning_rate=0.01), 1000)
    adam = optax.adam(0.01, nesterov=True)  # in whose company Muon is
    gradient = jax.tree.map(lambda a: drawn(*a.shape), params)
    (usual, _), (found, _) = (
        made.update(gradient, made.init(params), params) for made in (adam, made_of)
    )
    for of in (lambda tree: tree["a"]["bias"], lambda tree: tree["conv_in"]["kernel"]):
        np.testing.assert_allclose(of(found["params"]), of(usual["params"]), rtol=1e-5)

    # The nearest orthogonal matrix to the gradient, U V^T (five steps of Newton and Schulz are
    # within some 30 % of it), in the direction of descent, of its size.
    def check(update, gradient):
        rows, columns = update.shape
        rms = muon.RMS * 0.01
        scaled = update / (rms * np.sqrt(max(rows, columns)))
        assert np.abs(np.linalg.svd(scaled)[1] - 1).max() < 0.4
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        assert -(scaled * (u @ v)).sum() > 0.7 * min(rows, columns)

    update, slope = (tree["params"]["a"]["kernel"].reshape(-1, 16) for tree in (found, gradient))
    check(update, slope)
    pairs = zip(*(tree["params"]["b"]["c"]["kernel"] for tree in (found, gradient)), strict=True)
    for one, other in pairs:  # layers that are scanned over are matrices of their own
        check(one, other)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (12, 9), (16, 16)])
def test_newton_schulz_in_the_small_matrix_is_optax_s_in_the_whole(shape):
    """Over three steps of momentum, too, and from one state."""
    draws = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draws.normal(size=shape), jnp.float32)}
    axes = {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}
    usual = optax.contrib.scale_by_muon(muon.NEWTON_SCHULZ, weight_dimension_numbers=axes)
    ours = muon.scale_by_muon()
    state = usual.init(params)
    assert jax.tree.structure(ours.init(params)) == jax.tree.structure(state)
    mine = state
    for _ in range(3):  # singular values from 1 down to 1e-3
        sizes = np.geomspace(1, 1e-3, shape[1])
        gradient = {"kernel": jnp.asarray(draws.normal(size=shape) * sizes, jnp.float32)}
        theirs, state = usual.update(gradient, state)
        found, mine = ours.update(gradient, mine)
        scale = muon.RMS * np.sqrt(max(shape))
        np.testing.assert_allclose(found["kernel"] / scale, theirs["kernel"], atol=1e-3)
    np.testing.assert_allclose(mine.mu["kernel"], state.mu["kernel"])


def test_a_package_that_is_not_installed_is_recorded_as_none(monkeypatch):
    monkeypatch.setattr(records, "PACKAGES", ("jax", "no-such-package"))
    versions = records.provenance()["versions"]
    assert versions["jax"] == jax.__version__
    assert versions["no-such-package"] is None


class BadBelow(SmallTask):
    """One weight, whose gradient is 1, and a loss that is nan where it is less than -12.5."""

    def init(self, key, batch):
        return Variables({"w": jnp.zeros(())}, {})

    def loss(self, variables, batch, keys, *, train, all_gather):
        weight = variables.params["w"]
        value = weight + 0 * jnp.log(weight + 12.5)
        return LossOutput(jnp.full(len(batch.images), value), {}, {})


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(digits, tmp_path):
    """The weight falls by 1 a step (Adam's, under a constant gradient), into a bad logarithm."""
    config = small({"optimizer": CONSTANT}, checkpoint_every=4)
    says = r"loss is nan at step 14, of training examples .* of step 12"
    with pytest.raises(RunError, match=says):
        fit(config, digits, tmp_path, BadBelow())
    checkpoints = open_checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.newest() == 12
    checkpoints.close()


class BadAtSix(SmallTask):
    """One weight, whose gradient is 1, and one example's loss nan once six steps were taken."""

    def init(self, key, batch):
        return Variables({"w": jnp.zeros(())}, {"step": jnp.zeros((), jnp.int32)})

    def loss(self, variables, batch, keys, *, train, all_gather):
        bad = self.is_bad(variables, keys) & (batch.index == 5)
        return LossOutput(jnp.where(bad, jnp.nan, 1.0) * variables.params["w"], {}, {})

    def is_bad(self, variables, keys):
        return variables.extra["step"] == 6

    def update_extra(self, extra, statistics):
        return {"step": extra["step"] + 1}


class BadAtSixByChance(BadAtSix):
    """Bad while the weight says that six steps were taken, and a draw of the step says so."""

    def is_bad(self, variables, keys):
        weight = variables.params["w"]
        return (weight < -5.5) & (weight > -6.5) & jax.random.bernoulli(keys[0], 0.5)


def test_a_step_that_is_not_finite_names_its_training_examples(digits, tmp_path):
    order = batches.epoch_order(0, len(digits.train.images))(6 * 16, 7 * 16)
    with pytest.raises(RunError, match=rf"loss is nan at step 7, of training examples {order[5]};"):
        fit(small(), digits, tmp_path, BadAtSix())


def test_steps_that_are_not_finite_are_skipped_and_counted(digits, tmp_path):
    # A skipped step updates nothing, so the count of `BadAtSix` would stand still: all are bad.
    config = small({"optimizer": CONSTANT}, log_every=10, max_consecutive_nonfinite_steps=3)
    found = fit(config, digits, tmp_path, BadAtSixByChance())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    skipped = sum(line["train/skipped"] for line in lines if "train/skipped" in line)
    assert float(found.state.params["w"]) == pytest.approx(-(20 - skipped), rel=1e-4)
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)


def test_too_many_bad_steps_in_a_row_stop_the_run(digits, tmp_path):
    with pytest.raises(RunError, match="loss is nan at step 9, of training examples"):
        fit(small(max_consecutive_nonfinite_steps=2), digits, tmp_path, BadAtSix())


def test_an_image_is_the_same_in_any_batch(digits):
    config = small()
    task = checked_task(config)
    params = step_module.init_state(task, config, batch_of(digits, 100), 0).params
    keys = example_keys(purpose_key(0, TRAIN), 0, jnp.arange(64))
    many = sample(task, Variables(params, {}), keys)
    few = sample(task, Variables(params, {}), keys[:8])
    np.testing.assert_allclose(many[7], few[7], atol=1e-6)


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    state, host = {"x": jnp.arange(3.0)}, {"window": {"loss": 1.0}}
    overwrite = jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, state, host)
    for _ in range(100):  # while it is written in the background
        host["window"]["loss"] += 1
        state = overwrite(state)
    checkpoints.wait()
    found, record = checkpoints.restore(1, {"x": jnp.zeros(3)})
    checkpoints.close()
    chex.assert_trees_all_equal(found, {"x": jnp.arange(3.0)})
    assert record == {"window": {"loss": 1.0}}


def test_what_only_training_reads_is_not_read_for_drawing(tmp_path):
    averages = ema(more_half_lives_images=(2.0,), evaluated="half_life=2")
    config = small(averages, steps=4, checkpoint_every=2)
    run.train(EXPERIMENT, config, tmp_path, Options())
    shapes = step_module.state_shapes(checked_task(config), config, INFO.shape)
    checkpoints = open_checkpoints(tmp_path / "checkpoints", read_only=True)
    whole, _ = checkpoints.restore(4, sharding.make().like(shapes))
    checkpoints.close()
    _, state = recorded.load_state(tmp_path)
    chex.assert_trees_all_equal(
        step_module.averaged(state, config), step_module.averaged(whole, config)
    )
    chex.assert_trees_all_equal((state.step, state.extra), (whole.step, whole.extra))
    assert not jax.tree.leaves((state.params, state.opt_state, state.ema[0]))


# Interruptions, of a real process.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    return end_of(workdir)


def kill_and_resume(workdir, uninterrupted, moments):
    for lines, delay in moments:
        process = start(workdir)
        enough = steps_of(workdir) + lines
        wait_for(lambda enough=enough: steps_of(workdir) >= enough, process)
        time.sleep(delay)
        process.kill()
        process.wait()
    finish(workdir)
    arrays, metrics = end_of(workdir)
    assert arrays == uninterrupted[0]
    assert metrics == uninterrupted[1]


def test_a_killed_run_started_again_ends_bit_identical(tmp_path, uninterrupted):
    kill_and_resume(tmp_path / "run", uninterrupted, [(9, 0.0)])


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_identical(tmp_path, uninterrupted):
    rng = random.Random(os.urandom(8))
    moments = [(rng.randint(0, 3), rng.uniform(0, 0.3)) for _ in range(20)]
    print(moments)
    kill_and_resume(tmp_path / "run", uninterrupted, moments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_writes_a_checkpoint_and_exits_cleanly(number, tmp_path, uninterrupted):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(lambda: steps_of(workdir) >= 5, process)
    process.send_signal(number)
    asked = time.monotonic()
    assert process.wait(timeout=60) == 0
    assert time.monotonic() - asked < 30
    log = (tmp_path / "run.log").read_text()
    assert "stopped at step" in log
    assert "Traceback" not in log
    finish(workdir)
    assert end_of(workdir) == uninterrupted


def test_a_second_process_on_one_directory_is_refused_and_the_first_unharmed(
    tmp_path, uninterrupted, launch
):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(lambda: steps_of(workdir) >= 2, process)
    second = launch(*COMMAND[2:], f"--workdir={workdir}")
    assert second.returncode == 2
    assert "another process is training in" in second.stderr
    assert process.wait(timeout=120) == 0
    assert end_of(workdir) == uninterrupted
