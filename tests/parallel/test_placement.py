"""Evaluation and sampling run on any number of devices, and their results are replicated."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Data, DataInfo, Split
from ddpm_jax.diffusion.prediction import Prediction
from ddpm_jax.diffusion.process import alpha_sigma
from ddpm_jax.diffusion.schedules import cosine
from ddpm_jax.experiment.requests import Request
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.parallel import sharding
from ddpm_jax.task import Variables
from ddpm_jax.tasks.image_sampler import Sampling
from helpers.launching import ROOT
from helpers.sampling import context_of, edit_images, sample
from helpers.tasks import ExactDenoiser

# Files that call jax's compilers: for training programs, whose shardings are stated, and for
# functions of one array, the check sum of an array and the orthogonalisation of a matrix in Muon.
COMPILES = {
    "collectives.py", "partitioner.py", "replicated.py", "loop.py", "step.py", "check_sums.py",
    "muon.py",
}  # fmt: skip
COMPILERS = {"jit", "pmap", "pjit", "shard_map", "filter_jit"}


def names_of(path: pathlib.Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return names | {alias.name.rpartition(".")[2] for node in imports for alias in node.names}


def test_only_training_and_parallel_call_the_compilers_of_jax():
    files = [*(ROOT / "ddpm_jax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]
    compiling = {path.name for path in files if names_of(path) & COMPILERS}
    assert compiling <= COMPILES


@pytest.mark.parametrize("mode", sharding.MODES)
@pytest.mark.parametrize("count", [3, 4, 8])
def test_the_shapes_of_results_need_not_be_multiples_of_the_number_of_devices(mode, count):
    partitioner = sharding.make(mode, jax.devices()[:count])

    def fn(x):
        return x[:10], jnp.outer(x, jnp.arange(7))[:, 1:], x.sum(), x[None, :5] * jnp.ones((7, 1))

    size = partitioner.round_up(100)
    actual = sharding.fetch(partitioner.compile(fn)(partitioner.indices(0, size)))
    x = np.arange(size)
    expected = x[:10], np.outer(x, np.arange(1, 7)), x.sum(), np.tile(x[:5], (7, 1))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


SHAPE = (4, 4, 1)


def denoiser(traces=None):
    """Return the exact denoiser of N(params, 1), which appends to `traces` at each trace."""
    traces = [] if traces is None else traces

    def predict(params, xt, logsnr, labels):
        traces.append(len(xt))
        alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
        mean = params["mean"] + labels[:, None, None, None]
        x0 = alpha * xt + sigma**2 * mean
        return Prediction(x0, (xt - alpha * x0) / sigma)

    sampling = Sampling("ancestral", 3, "logsnr", x0_thresholding="none")
    info = DataInfo("x", SHAPE, 256, 2)
    return ExactDenoiser(predict, cosine(-5.0, 5.0), sampling, classes=2, info=info)


DENOISER = denoiser()
PARAMS = {"mean": np.full(SHAPE, 0.25, np.float32)}
IMAGES = Split(np.zeros((5, *SHAPE), np.uint8), np.zeros(5, np.int32))
DATA = Data("x", "x", IMAGES, IMAGES, 256, ("a", "b"), "")


@functools.cache
def on(mode, count):
    """Return (images, trace, sampled, edited), computed on `count` devices in `mode`."""
    partitioner = sharding.make(mode, jax.devices()[:count])
    variables = Variables(partitioner.place(PARAMS), {})
    samples = context_of(DENOISER, variables, DATA, partitioner=partitioner).samples(100)
    keys = jax.random.split(jax.random.key(0), 5)
    zeros = np.zeros((5, *SHAPE), np.float32)
    labels = jnp.zeros(5, jnp.int32)
    sampled = sample(DENOISER, variables, keys, Request(guidance=2.0), partitioner=partitioner)
    images = (zeros, zeros, zeros)
    edits = edit_images(DENOISER, variables, keys, labels, 0.5, *images, partitioner=partitioner)
    return sharding.fetch((samples.images, samples.trace, sampled, edits))


@pytest.mark.parametrize("mode", sharding.MODES)
def test_samples_and_traces_on_four_devices_equal_those_on_one(mode):
    assert on(mode, 4)[1].xt.shape == (3, 10, *SHAPE)
    for actual, expected in zip(*map(jax.tree.leaves, (on(mode, 4), on("jit", 1))), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_sampler_is_traced_once_for_all_calls_and_guidance_scales():
    traces = []
    task, variables = denoiser(traces), Variables(PARAMS, {})
    keys = jax.random.split(jax.random.key(0), 4)
    sample(task, variables, keys, Request(guidance=2.0))
    first = len(traces)
    assert first > 0
    for scale in (1.5, 3.0, 2.0):
        sample(task, variables, keys, Request(guidance=scale))
        partitioner = sharding.partitioner_of(PARAMS)
        sample(task, variables, keys, Request(guidance=scale), partitioner=partitioner)
    assert len(traces) == first


def test_an_evaluation_is_traced_once_for_all_calls():
    traces = []

    def squared(params, batch, keys):
        traces.append(1)
        return {"value": params * batch.images.sum((1, 2, 3)).astype(jnp.float32)}

    split = Split(np.ones((10, 2, 2, 1), np.uint8), np.zeros(10, np.int32))
    for scale in (1.0, 2.0, 3.0):
        partitioner = sharding.make(
            "jit", jax.devices()[:4]
        )  # a new object for each call, as for feature networks
        values = per_example(squared, split, 3, 0, partitioner, np.float32(scale))
        np.testing.assert_array_equal(values["value"], np.full(10, 4 * scale))
    assert len(traces) == 1


@pytest.mark.parametrize("mode", sharding.MODES)
def test_a_trained_state_has_the_mesh_of_evaluation(mode):
    partitioner = sharding.make(mode, jax.devices()[:4])

    def step(state, batch, collectives):
        return state + collectives.mean(batch.mean()), {}

    state = partitioner.place(np.zeros(8, np.float32))
    batch = partitioner.feed(np.ones(8, np.float32))
    state, _ = partitioner.lower(step, partitioner.abstract_state(state), batch)()(state, batch)
    assert state.sharding.mesh == partitioner.indices(0, 8).sharding.mesh


def test_computation_is_partitioned_where_results_are_replicated():
    partitioner = sharding.make("jit", jax.devices()[:4])
    batch = partitioner.shard(np.ones((8, 16), np.float32))
    program = partitioner.compile(lambda w, x: jnp.tanh(x @ w)).lower(
        np.ones((16, 32), np.float32), batch
    )
    assert (
        "f32[2,32]" in program.compile().as_text()
    )  # two rows on each device, gathered at the end


# Through the command line.


def forced(count):
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def succeeds(launch, count, *flags):
    result = launch(*flags, timeout=600, **forced(count))
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


def test_a_diffusion_run_evaluates_and_samples_on_four_devices_under_pmap(launch, tmp_path):
    succeeds(
        launch, 4, "--experiment=ddpm_digits", "--debug", "--parallel=pmap",
        f"--workdir={tmp_path / 'run'}", "--config.task.sampling.steps=2",
    )  # fmt: skip
    assert (tmp_path / "run" / "images" / "trajectories.png").exists()


SAMPLE = ("--mode=sample", "--num_samples=5")
RUNS = {  # an experiment: flags of training; (directory, flags) of the commands after it
    "vae_digits": ((), [("", SAMPLE)]),
    "ddpm_digits": (("--config.task.evaluation.features=classifier_digits",), [("", SAMPLE)]),
    "vdm_digits": ((), [("", SAMPLE)]),
    "classifier_digits": ((), []),
    "text_to_image_shapes": (
        (),
        [("", (*SAMPLE, "--prompt=a red circle")), ("text", ()), ("autoencoder", ())],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", sharding.MODES)
@pytest.mark.parametrize(
    ("experiment", "count"), [*((name, 4) for name in RUNS), ("ddpm_digits", 8)]
)
def test_every_task_trains_evaluates_and_samples_in_every_mode(
    launch, tmp_path, experiment, count, mode
):
    training, after = RUNS[experiment]
    workdir, common = tmp_path / "run", ("--debug", f"--parallel={mode}")
    succeeds(
        launch, count, f"--experiment={experiment}", f"--workdir={workdir}", *common, *training
    )
    for directory, flags in [("", ()), *after]:
        flags = flags or ("--mode=eval",)
        succeeds(launch, count, f"--workdir={workdir / directory}", *common, *flags)
