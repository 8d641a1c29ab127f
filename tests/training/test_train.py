"""The training loop compiles one program, and interruptions do not change its result."""

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

from ddpm_jax.config import marked_paths, replace
from ddpm_jax.config_records import to_record
from ddpm_jax.data import batches, loader, types
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.experiment import recorded, run
from ddpm_jax.experiment.inputs import config_with
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
from helpers.runs import COMMAND, count_logged_lines, finish, result_of, start, wait_for
from helpers.sampling import sample
from helpers.tasks import SmallTask, not_evaluated


@pytest.fixture(scope="module")
def digits():
    return loader.load("digits")


EXPERIMENT = load_experiment("vae_digits")
INFO = types.DataInfo("digits", (8, 8, 1), 17, 10)
# With a constant gradient each step of Adam has size 1.
CONSTANT = optimizer_module.Adam(learning_rate=1.0)


def small(values=(), **train):
    """Return the debug config with batches of 16, `values` by path, and fields of `train`."""
    train = {f"train.{name}": value for name, value in train.items()}
    values = {"train.batch_size": 16, **train, **dict(values)}
    return bind(config_with(EXPERIMENT, True, values), INFO)


def ema(**fields):
    """Return the settings of averages, as an argument of `small`."""
    return {"ema": ema_module.EMA(**fields)}


def batch_of(data, size, start=0):
    rows = slice(start, start + size)
    return types.Batch(data.train.images[rows], data.train.labels[rows], np.arange(size))


def step_of(task, config, seed=0):
    return lambda state, batch: step_module.train_step(task, config, seed, state, batch)


def fit(config, data, workdir, task=None, seed=0):
    task = task or checked_task(config)
    record = {"experiment": "test", "config": to_record(config), "seed": seed, "data": {}}
    run = open_run(workdir, record, marked_paths(config, MAY_CHANGE))
    checkpoints = open_checkpoints(workdir / "checkpoints")
    try:
        return train.fit(task, config, data, run, checkpoints, seed, sharding.make())
    finally:
        checkpoints.close()
        run.close()


class StepsAlone(VAE):
    """A VAE without an evaluation, which would take longer than a few steps."""

    def evaluations(self):
        """Return a function that computes nothing."""
        return (not_evaluated,)


def fit_alone(config, data, workdir, task_class=StepsAlone):
    """Call `fit` without a final evaluation."""
    return fit(config, data, workdir, task_class(**vars(checked_task(config))))


def test_training_uses_validation_images_and_only_the_final_evaluation_test_images(
    digits, tmp_path
):
    """The best checkpoint is that of the lowest validation loss."""
    evaluated = []

    def evaluate(task, context):
        evaluated.append((context.split, context.full))
        return Evaluation({"loss": float([3.0, 1.0, 2.0, 0.5][len(evaluated) - 1])})

    class Evaluated(VAE):
        def evaluations(self):
            return (evaluate,)

    config = small(steps=8, eval_every=2, checkpoint_every=1, steps_per_call=1)
    task = Evaluated(**vars(checked_task(config)))
    result = fit(config, digits, tmp_path / "run", task)
    assert evaluated == [("validation", False)] * 3 + [("test", True)]
    assert result.final.metrics == {"test/loss": 0.5}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert losses == {2: 3.0, 4: 1.0, 6: 2.0}
    stored = {int(path.name) for path in (tmp_path / "run/checkpoints").glob("[0-9]*")}
    assert stored == {4, 6, 7, 8}  # the newest three and the best


@pytest.mark.parametrize("conv", [False, True])
def test_a_vae_overfits_one_batch(digits, conv):
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
    # The remaining error is the standard deviation of dequantisation: bin width / sqrt(12).
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
    # Calls have 1 to 5 steps. The loss is traced only for its shapes and for the body of the loop.
    lengths = {last - first for first, last in program.calls(0, config)}
    assert len(lengths) > 2
    assert len(traces) <= 3


def test_the_number_of_steps_in_a_call_changes_no_bit_of_the_result(digits, tmp_path):
    states = []
    for number, log_every in enumerate((3, 5, 20)):
        config = small(log_every=log_every, eval_every=0, checkpoint_every=0)
        states.append(fit_alone(config, digits, tmp_path / str(number)).state)
    chex.assert_trees_all_equal(states[0], states[1], states[2])


def test_logged_metrics_are_means_over_the_steps_since_the_last_line(digits, tmp_path):
    ones = small(log_every=1, eval_every=0, checkpoint_every=0)
    fives = small(log_every=5, eval_every=0, checkpoint_every=0)
    fit_alone(ones, digits, tmp_path / "ones")
    fit_alone(fives, digits, tmp_path / "fives")

    def lines(name):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        return [record for record in records if "train/loss" in record]

    losses = [line["train/loss"] for line in lines("ones")]
    assert [line["step"] for line in lines("ones")] == list(range(1, 21))
    for line in lines("fives"):
        expected = np.mean(losses[line["step"] - 5 : line["step"]])
        assert line["train/loss"] == pytest.approx(expected, rel=1e-12)


def test_each_step_and_example_has_its_own_random_key():
    key = purpose_key(0, TRAIN)
    keys = example_keys(key, 3, jnp.arange(8))
    part = example_keys(key, 3, jnp.array([6, 2]))
    chex.assert_trees_all_equal(
        jax.random.key_data(part), jax.random.key_data(keys)[np.array([6, 2])]
    )
    data = jax.random.key_data(jnp.stack([keys, example_keys(key, 4, jnp.arange(8))]))
    assert len(np.unique(data.reshape(16, -1), axis=0)) == 16


def test_the_average_has_its_half_life_after_the_warm_up():
    # Late in training, 10 steps of 100 images halve the weight of the old average.
    decay = ema_module.ema_decay(10**6, 100, 1000.0)
    assert float(decay) ** 10 == pytest.approx(0.5, rel=1e-5)
    # Early in training, the half-life is 5 % of the images seen.
    assert float(ema_module.ema_decay(10, 100, 1e9)) == pytest.approx(0.5 ** (1 / 0.5), rel=1e-5)


def test_the_weights_of_a_power_function_average_have_the_configured_width():
    width, steps = 0.1, 20_000
    decays = np.asarray(ema_module.power_decay(np.arange(1, steps + 1), width), np.float64)
    weights = (1 - decays) * np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    assert weights.sum() == pytest.approx(1, abs=1e-3)
    time = np.arange(1, steps + 1) / steps
    mean = (weights * time).sum()
    assert np.sqrt((weights * (time - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


def test_a_state_has_several_averages_and_the_config_selects_one(digits, tmp_path):
    averages = dict(more_half_lives_images=(0.0, 100.0), power_widths=(0.1,))
    config = small(ema(half_life_images=1e6, evaluated="half_life=0", **averages))
    state = fit_alone(config, digits, tmp_path).state
    assert len(state.ema) == 4
    chex.assert_trees_all_equal(
        step_module.evaluated_params(state, config), state.params
    )  # no averaging
    alone = fit_alone(small(ema(half_life_images=100.0)), digits, tmp_path / "alone").state
    # The two programs round sums near 0 differently.
    chex.assert_trees_all_close(state.ema[2], alone.ema[0], rtol=1e-6, atol=1e-9)
    names = "first, half_life=1000000, half_life=0, half_life=100, power=0.1"
    with pytest.raises(UserError, match=f"no average of that name; choose one of {names}$"):
        recorded.check_average(replace(config, {"ema.evaluated": "power=0.2"}))


def test_the_record_names_the_average_that_was_evaluated():
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


def test_muon_trains_inner_kernels_as_matrices_and_adam_all_other_parameters():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    inner = {"kernel": normal(3, 3, 2, 16), "bias": normal(16)}
    scanned = {"kernel": normal(5, 12, 8)}
    first = {"kernel": normal(3, 3, 1, 8)}
    params = {"params": {"conv_in": first, "a": inner, "b": {"c": scanned}}}
    mixed = optimizer_module.make_optimizer(optimizer_module.Muon(learning_rate=0.01), 1000)
    adam = optax.adam(0.01, nesterov=True)
    gradient = jax.tree.map(lambda a: normal(*a.shape), params)
    (expected, _), (actual, _) = (
        optimizer.update(gradient, optimizer.init(params), params) for optimizer in (adam, mixed)
    )
    for leaf in (lambda tree: tree["a"]["bias"], lambda tree: tree["conv_in"]["kernel"]):
        np.testing.assert_allclose(leaf(actual["params"]), leaf(expected["params"]), rtol=1e-5)

    # The update is -U V^T of the gradient U S V^T, times a fixed size. Five Newton-Schulz
    # iterations approximate it with singular values within 40 % of 1.
    def check(update, gradient):
        rows, columns = update.shape
        rms = muon.RMS * 0.01
        scaled = update / (rms * np.sqrt(max(rows, columns)))
        assert np.abs(np.linalg.svd(scaled)[1] - 1).max() < 0.4
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        assert -(scaled * (u @ v)).sum() > 0.7 * min(rows, columns)

    update, slope = (tree["params"]["a"]["kernel"].reshape(-1, 16) for tree in (actual, gradient))
    check(update, slope)
    pairs = zip(*(tree["params"]["b"]["c"]["kernel"] for tree in (actual, gradient)), strict=True)
    for update, slope in pairs:  # each layer of a scan is a separate matrix
        check(update, slope)


@pytest.mark.parametrize("shape", [(40, 8), (8, 40), (12, 9), (16, 16)])
def test_newton_schulz_on_the_gram_matrix_equals_that_of_optax_on_the_full_matrix(shape):
    """The updates are equal over three steps of momentum that start from the same state."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    axes = {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}
    reference = optax.contrib.scale_by_muon(muon.NEWTON_SCHULZ, weight_dimension_numbers=axes)
    gram = muon.scale_by_muon()
    reference_state = gram_state = reference.init(params)
    assert jax.tree.structure(gram.init(params)) == jax.tree.structure(reference_state)
    for _ in range(3):  # singular values from 1 down to 1e-3
        sizes = np.geomspace(1, 1e-3, shape[1])
        gradient = {"kernel": jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)}
        expected, reference_state = reference.update(gradient, reference_state)
        actual, gram_state = gram.update(gradient, gram_state)
        scale = muon.RMS * np.sqrt(max(shape))
        np.testing.assert_allclose(actual["kernel"] / scale, expected["kernel"], atol=1e-3)
    np.testing.assert_allclose(gram_state.mu["kernel"], reference_state.mu["kernel"])


def test_a_package_that_is_not_installed_is_recorded_as_none(monkeypatch):
    monkeypatch.setattr(records, "PACKAGES", ("jax", "no-such-package"))
    versions = records.provenance()["versions"]
    assert versions["jax"] == jax.__version__
    assert versions["no-such-package"] is None


class BadBelow(SmallTask):
    """One weight w with gradient 1; the loss is NaN if w < -12.5."""

    def init(self, key, batch):
        return Variables({"w": jnp.zeros(())}, {})

    def loss(self, variables, batch, keys, *, train, all_gather):
        weight = variables.params["w"]
        value = weight + 0 * jnp.log(weight + 12.5)
        return LossOutput(jnp.full(len(batch.images), value), {}, {})


def test_a_loss_that_is_not_finite_stops_the_run_and_the_error_names_the_step(digits, tmp_path):
    """Each step of Adam lowers the weight by 1, until the logarithm in the loss is NaN."""
    config = small({"optimizer": CONSTANT}, checkpoint_every=4)
    message = r"loss is nan at step 14, for training examples .*; step 12 has the newest"
    with pytest.raises(RunError, match=message):
        fit(config, digits, tmp_path, BadBelow())
    checkpoints = open_checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.newest() == 12
    checkpoints.close()


class BadAtSix(SmallTask):
    """One weight with gradient 1; in the seventh step the loss of one example is NaN."""

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
    """After six updates the loss of one example is NaN with probability 0.5 per step."""

    def is_bad(self, variables, keys):
        weight = variables.params["w"]
        return (weight < -5.5) & (weight > -6.5) & jax.random.bernoulli(keys[0], 0.5)


def test_the_error_of_a_step_that_is_not_finite_names_the_training_examples(digits, tmp_path):
    order = batches.epoch_order(0, len(digits.train.images))(6 * 16, 7 * 16)
    with pytest.raises(
        RunError, match=rf"loss is nan at step 7, for training examples {order[5]};"
    ):
        fit(small(), digits, tmp_path, BadAtSix())


def test_steps_that_are_not_finite_are_skipped_and_counted(digits, tmp_path):
    # In `BadAtSix` every step after a skipped one fails, because a skipped step changes no count.
    config = small({"optimizer": CONSTANT}, log_every=10, max_consecutive_nonfinite_steps=3)
    result = fit(config, digits, tmp_path, BadAtSixByChance())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    skipped = sum(line["train/skipped"] for line in lines if "train/skipped" in line)
    assert float(result.state.params["w"]) == pytest.approx(-(20 - skipped), rel=1e-4)
    assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)


def test_too_many_consecutive_steps_that_are_not_finite_stop_the_run(digits, tmp_path):
    with pytest.raises(RunError, match="loss is nan at step 9, for training examples"):
        fit(small(max_consecutive_nonfinite_steps=2), digits, tmp_path, BadAtSix())


def test_a_sample_does_not_depend_on_the_other_images_of_its_batch(digits):
    config = small()
    task = checked_task(config)
    params = step_module.init_state(task, config, batch_of(digits, 100), 0).params
    keys = example_keys(purpose_key(0, TRAIN), 0, jnp.arange(64))
    many = sample(task, Variables(params, {}), keys)
    few = sample(task, Variables(params, {}), keys[:8])
    np.testing.assert_allclose(many[7], few[7], atol=1e-6)


def test_a_checkpoint_stores_the_state_at_the_time_of_the_call(tmp_path):
    state, host = {"x": jnp.arange(3.0)}, {"window": {"loss": 1.0}}
    overwrite = jax.jit(lambda state: {"x": state["x"] + 1}, donate_argnums=0)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, state, host)
    for _ in range(100):  # during the write in the background
        host["window"]["loss"] += 1
        state = overwrite(state)
    checkpoints.wait()
    restored, record = checkpoints.restore(1, {"x": jnp.zeros(3)})
    checkpoints.close()
    chex.assert_trees_all_equal(restored, {"x": jnp.arange(3.0)})
    assert record == {"window": {"loss": 1.0}}


def test_sampling_reads_only_the_selected_average_from_a_checkpoint(tmp_path):
    averages = ema(more_half_lives_images=(2.0,), evaluated="half_life=2")
    config = small(averages, steps=4, checkpoint_every=2)
    run.train(EXPERIMENT, config, tmp_path, Options())
    shapes = step_module.state_shapes(checked_task(config), config, INFO.shape)
    checkpoints = open_checkpoints(tmp_path / "checkpoints", read_only=True)
    full_state, _ = checkpoints.restore(4, sharding.make().abstract_state(shapes))
    checkpoints.close()
    _, state = recorded.load_state(tmp_path)
    chex.assert_trees_all_equal(
        step_module.evaluated_params(state, config),
        step_module.evaluated_params(full_state, config),
    )
    chex.assert_trees_all_equal((state.step, state.extra), (full_state.step, full_state.extra))
    assert not jax.tree.leaves((state.params, state.opt_state, state.ema[0]))


# Interruptions of a real process.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The result of a run without interruption."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(workdir)
    return result_of(workdir)


def kill_and_resume(workdir, uninterrupted, moments):
    """Kill and resume a run: each time `delay` seconds after `lines` further logged lines."""
    for lines, delay in moments:
        process = start(workdir)
        enough = count_logged_lines(workdir) + lines
        wait_for(lambda enough=enough: count_logged_lines(workdir) >= enough, process)
        time.sleep(delay)
        process.kill()
        process.wait()
    finish(workdir)
    arrays, metrics = result_of(workdir)
    assert arrays == uninterrupted[0]
    assert metrics == uninterrupted[1]


def test_a_killed_and_resumed_run_ends_with_identical_bits(tmp_path, uninterrupted):
    kill_and_resume(tmp_path / "run", uninterrupted, [(9, 0.0)])


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_identical_bits(tmp_path, uninterrupted):
    rng = random.Random(os.urandom(8))
    moments = [(rng.randint(0, 3), rng.uniform(0, 0.3)) for _ in range(20)]
    print(moments)
    kill_and_resume(tmp_path / "run", uninterrupted, moments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_with_a_checkpoint_and_exit_code_0(number, tmp_path, uninterrupted):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(lambda: count_logged_lines(workdir) >= 5, process)
    process.send_signal(number)
    signalled = time.monotonic()
    assert process.wait(timeout=60) == 0
    assert time.monotonic() - signalled < 30
    log = (tmp_path / "run.log").read_text()
    assert "stopped at step" in log
    assert "Traceback" not in log
    finish(workdir)
    assert result_of(workdir) == uninterrupted


def test_a_second_process_in_a_run_directory_is_refused_and_the_first_continues(
    tmp_path, uninterrupted, launch
):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(lambda: count_logged_lines(workdir) >= 2, process)
    second = launch(*COMMAND[2:], f"--workdir={workdir}")
    assert second.returncode == 2
    assert "another process is training in" in second.stderr
    assert process.wait(timeout=120) == 0
    assert result_of(workdir) == uninterrupted
