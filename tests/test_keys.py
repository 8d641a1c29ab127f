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
from ddpm_jax.diffusion.schedules import Cosine, CosineBetas
from ddpm_jax.diffusion.times import uniform_times
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.unet import UNet
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.rng import SAMPLE, TRAIN, example_keys, purpose_key
from ddpm_jax.tasks.classifier import Classifier
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_denoiser import SampleEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.tasks.vdm import VDM
from ddpm_jax.variational.likelihoods import Bernoulli
from helpers.sampling import evaluated, sample
from helpers.tasks import bound, first_variables, loss_of

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
    jax.clear_caches()  # a program that is compiled already holds no record of its draws
    record = Record()
    record.watch(monkeypatch)
    for module in ("diffusion", "vdm"):
        monkeypatch.setattr(f"ddpm_jax.tasks.{module}.SAMPLE_EVALUATIONS", ())
    yield record
    jax.clear_caches()


# A U-Net: a draw within a DiT's scan over blocks cannot be watched in jax 0.12.
NETWORK = UNet(channels=8, multipliers=(1,), blocks=1, attention_sizes=(), dropout=0.1)
CLASSIFIER = ClassifierNetwork(channels=(8,), features=8)
SHARED = dict(sampling=Sampling("ancestral_beta", 2), evaluation=SampleEvaluation(8, 2))
TASKS = {
    "diffusion": Diffusion(NETWORK, Cosine(), flip=True, **SHARED),
    "learned variance, importance": Diffusion(
        NETWORK, CosineBetas(50), variance="learned", times="importance", **SHARED
    ),
    "vdm": VDM(NETWORK, 8.0, -8.0, conditional=True, **SHARED),
    "classifier": Classifier(CLASSIFIER, 1, eval_batch_size=8),
    "noisy classifier": Classifier(CLASSIFIER, 1, Cosine(), eval_batch_size=8),
    "vae": VAE(VAENetwork(SHAPE, 2, (8,)), Bernoulli(), eval_batch_size=8, iwae_images=8),
}


def task_of(name):
    """A task bound to three classes of tiny images."""
    return bound(TASKS[name], SHAPE, LEVELS, classes=3)


def data():
    images = np.random.default_rng(0).integers(0, LEVELS, (8, *SHAPE), np.uint8)
    labels = (np.arange(8) % 3).astype(np.int32)
    batch = Batch(images, labels, np.arange(8, dtype=np.int32))
    split = Split(images, labels)
    whole = Data("tiny", "tiny", split, split, LEVELS, ("a", "b", "c"), "x")
    return jax.tree.map(jnp.asarray, batch), whole


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_loss_draws_from_each_key_for_one_purpose(name, monkeypatch):
    task, (batch, _) = task_of(name), data()
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    record = Record()
    of_examples = example_keys(purpose_key(0, TRAIN), 0, batch.index)
    record.watch(monkeypatch)

    @jax.jit  # of no result, so that the draws alone are compiled
    def losses(variables, of_examples):
        loss_of(task, variables, batch, of_examples)

    losses(variables, of_examples)
    record.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != "classifier"])
def test_a_tasks_evaluation_draws_from_each_key_for_one_purpose(name, record):
    task, (batch, whole) = task_of(name), data()
    variables = first_variables(task, batch)
    jax.effects_barrier()
    record.drawn.clear()
    record.parents.clear()
    evaluated(task, variables, whole, full=False)
    record.check(again=name == "vae")  # whose pictures are of the draws that its figures are of


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "vae"])
def test_a_tasks_samples_draw_from_each_key_for_one_purpose(name, record):
    task, (batch, _) = task_of(name), data()
    variables = first_variables(task, batch)
    jax.effects_barrier()
    record.drawn.clear()
    record.parents.clear()
    sample(task, variables, example_keys(purpose_key(0, SAMPLE), 0, batch.index))
    record.check()


def test_a_key_that_is_used_twice_is_found(monkeypatch):
    record = Record()
    record.watch(monkeypatch)
    two = jax.random.split(jax.random.key(0), 2)
    uniform_times(two, jnp.arange(2), 2)
    record.check()
    uniform_times(two, jnp.arange(2), 2)
    with pytest.raises(AssertionError):
        record.check()
