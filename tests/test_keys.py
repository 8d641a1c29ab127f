"""No key is used for two purposes: every key that is drawn from is recorded while tasks run."""

import collections
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import rng
from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.diffusion import losses as loss
from ddpm_jax.diffusion.schedules import cosine, cosine_betas, from_betas
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.unet import UNet
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.parallel.sharding import make
from ddpm_jax.rng import SAMPLE, TRAIN, example_keys, purpose_key
from ddpm_jax.task import Evaluation, Request
from ddpm_jax.tasks.classifier import classifier_task
from ddpm_jax.tasks.diffusion import diffusion_task
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vae import vae_task
from ddpm_jax.tasks.vdm import vdm_task
from ddpm_jax.variational import likelihoods as likelihood

DRAWS = ("normal", "uniform", "bernoulli", "randint", "categorical", "bits", "rademacher")
PACKAGE = str(pathlib.Path(rng.__file__).parent)
SHAPE, LEVELS = (4, 4, 1), 17


class Record:
    """The keys that were drawn from and those that others were derived from, with the lines."""

    def __init__(self):
        self.drawn, self.parents = collections.defaultdict(list), collections.defaultdict(list)

    def watch(self, monkeypatch):
        """Record every draw and derivation from here on."""
        for name in DRAWS:
            self._wrap(monkeypatch, name, self.drawn)
        for name in ("split", "fold_in"):
            self._wrap(monkeypatch, name, self.parents)

    def _wrap(self, monkeypatch, name, table):
        original = getattr(jax.random, name)

        def note(line, data):
            table[np.asarray(data).tobytes()].append(line)

        @functools.wraps(original)
        def wrapped(key, *rest, **named):
            frame = sys._getframe(1)
            while not frame.f_code.co_filename.startswith(PACKAGE):
                if frame.f_back is None:  # JAX's own draws
                    return original(key, *rest, **named)
                frame = frame.f_back
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            jax.debug.callback(functools.partial(note, line), jax.random.key_data(key))
            return original(key, *rest, **named)

        monkeypatch.setattr(jax.random, name, wrapped)

    def check(self, again=False):
        """No key is drawn from on two lines, nor drawn from and derived from.

        Args:
          again: a line may draw from a key again, as two passes over one image's draws do.
        """
        jax.effects_barrier()
        assert self.drawn
        for key, lines in self.drawn.items():
            assert len(set(lines)) == 1, lines
            assert again or len(lines) == 1, lines
            assert key not in self.parents, (lines, self.parents[key])


@pytest.fixture
def record(monkeypatch):
    found = Record()
    found.watch(monkeypatch)
    monkeypatch.setattr("ddpm_jax.tasks.diffusion.show", lambda *rest: Evaluation({}, {}))
    monkeypatch.setattr("ddpm_jax.tasks.vdm.show", lambda *rest: Evaluation({}, {}))
    return found


def small(outputs=1):
    """A U-Net: a draw within a DiT's scan over blocks cannot be watched in jax 0.12."""
    return UNet(
        outputs=outputs,
        channels=8,
        multipliers=(1,),
        blocks=1,
        attention_sizes=(),
        classes=3,
        dropout=0.1,
    )


DRAWING = Sampling("ancestral_beta", 2)
TASKS = {
    "diffusion": lambda: diffusion_task(
        small(), cosine(), SHAPE, LEVELS, flip=True, sampling=DRAWING, batch_size=8, eval_batch=8,
        eval_times=2
    ),
    "learned variance, importance": lambda: diffusion_task(
        small(2), from_betas(cosine_betas(50)), SHAPE, LEVELS, variance="learned",
        times="importance", sampling=DRAWING, batch_size=8, eval_batch=8,
        eval_times=2,
    ),
    "vdm": lambda: vdm_task(
        small(), SHAPE, LEVELS, ends=(8.0, -8.0), sampling=DRAWING, batch_size=8, eval_batch=8,
        eval_times=2,
    ),
    "classifier": lambda: classifier_task(
        ClassifierNetwork(3, (8,), 8), SHAPE, LEVELS, shift=1, eval_batch=8
    ),
    "noisy classifier": lambda: classifier_task(
        ClassifierNetwork(3, (8,), 8, noisy=True), SHAPE, LEVELS, shift=1, schedule=cosine(),
        eval_batch=8
    ),
    "vae": lambda: vae_task(
        VAENetwork(SHAPE, 2, (8,)), likelihood.bernoulli(LEVELS), beta=1.0, eval_batch=8,
        iwae_images=8,
    ),
}  # fmt: skip


def data():
    images = np.random.default_rng(0).integers(0, LEVELS, (8, *SHAPE), np.uint8)
    labels = (np.arange(8) % 3).astype(np.int32)
    batch = Batch(images, labels, np.arange(8, dtype=np.int32))
    split = Split(images, labels)
    whole = Data("tiny", "tiny", split, split, LEVELS, ("a", "b", "c"), "x")
    return jax.tree.map(jnp.asarray, batch), whole


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_loss_draws_from_each_key_for_one_purpose(name, monkeypatch):
    task, (batch, _) = TASKS[name](), data()
    made = jax.eval_shape(task.init, jax.random.key(0), batch)
    params, fixed = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), made)
    record = Record()
    of_examples = example_keys(purpose_key(0, TRAIN), 0, batch.index)
    record.watch(monkeypatch)

    @jax.jit  # of no result, so that the draws alone are compiled
    def losses(params, fixed, of_examples):
        task.loss(params, fixed, batch, of_examples, train=True, gather=lambda tree: tree)

    losses(params, fixed, of_examples)
    record.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != "classifier"])
def test_a_tasks_evaluation_draws_from_each_key_for_one_purpose(name, record):
    task, (batch, whole) = TASKS[name](), data()
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch)
    jax.effects_barrier()
    record.drawn.clear()
    record.parents.clear()
    task.evaluate(params, fixed, whole, split="test", seed=0, full=False, spread=make())
    record.check(again=name == "vae")  # whose pictures are of the draws that its figures are of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "vae"])
def test_a_tasks_samples_draw_from_each_key_for_one_purpose(name, record):
    task, (batch, _) = TASKS[name](), data()
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch)
    jax.effects_barrier()
    record.drawn.clear()
    record.parents.clear()
    task.sample(params, fixed, example_keys(purpose_key(0, SAMPLE), 0, batch.index), Request())
    record.check()


def test_a_key_that_is_used_twice_is_found(monkeypatch):
    record = Record()
    record.watch(monkeypatch)
    two = jax.random.split(jax.random.key(0), 2)
    loss.uniform_times(two, jnp.arange(2), 2)
    record.check()
    loss.uniform_times(two, jnp.arange(2), 2)
    with pytest.raises(AssertionError):
        record.check()
