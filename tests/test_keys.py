"""No random key is used for two purposes: the tests record every use of a key in a task."""

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

SAMPLERS = ("normal", "uniform", "bernoulli", "randint", "categorical", "bits", "rademacher")
PACKAGE = str(pathlib.Path(rng.__file__).parent)
SHAPE, LEVELS = (4, 4, 1), 17


class Record:
    """The keys that were sampled from and that others were derived from, with the lines of code."""

    def __init__(self):
        self.sampled, self.parents = collections.defaultdict(list), collections.defaultdict(list)

    def watch(self, monkeypatch):
        """Start to record every use of a key."""
        for name in SAMPLERS:
            self._wrap(monkeypatch, name, self.sampled)
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
                if frame.f_back is None:  # called by JAX itself
                    return original(key, *rest, **named)
                frame = frame.f_back
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            jax.debug.callback(functools.partial(note, line), jax.random.key_data(key))
            return original(key, *rest, **named)

        monkeypatch.setattr(jax.random, name, wrapped)

    def check(self, again=False):
        """Check that no key is sampled from on two lines, or both sampled from and derived from.

        Args:
          again: Whether one line may sample from a key twice, as two passes over an image do.
        """
        jax.effects_barrier()
        assert self.sampled
        for key, lines in self.sampled.items():
            assert len(set(lines)) == 1, lines
            assert again or len(lines) == 1, lines
            assert key not in self.parents, (lines, self.parents[key])


@pytest.fixture
def record(monkeypatch):
    jax.clear_caches()  # a program that was compiled before does not record its keys
    record = Record()
    record.watch(monkeypatch)
    for module in ("diffusion", "vdm"):
        monkeypatch.setattr(f"ddpm_jax.tasks.{module}.SAMPLE_EVALUATIONS", ())
    yield record
    jax.clear_caches()


# A U-Net, because jax 0.12 cannot call back from a DiT's scan over blocks.
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
    """Return a task that is bound to three classes of images of 4 x 4 pixels."""
    return bound(TASKS[name], SHAPE, LEVELS, classes=3)


def data():
    images = np.random.default_rng(0).integers(0, LEVELS, (8, *SHAPE), np.uint8)
    labels = (np.arange(8) % 3).astype(np.int32)
    batch = Batch(images, labels, np.arange(8, dtype=np.int32))
    split = Split(images, labels)
    data_set = Data("tiny", "tiny", split, split, LEVELS, ("a", "b", "c"), "x")
    return jax.tree.map(jnp.asarray, batch), data_set


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_of_a_task_uses_each_key_for_one_purpose(name, monkeypatch):
    task, (batch, _) = task_of(name), data()
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch)
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    record = Record()
    keys = example_keys(purpose_key(0, TRAIN), 0, batch.index)
    record.watch(monkeypatch)

    @jax.jit  # it returns no result, so that XLA compiles only the sampling
    def losses(variables, keys):
        loss_of(task, variables, batch, keys)

    losses(variables, keys)
    record.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != "classifier"])
def test_the_evaluation_of_a_task_uses_each_key_for_one_purpose(name, record):
    task, (batch, data_set) = task_of(name), data()
    variables = first_variables(task, batch)
    jax.effects_barrier()
    record.sampled.clear()
    record.parents.clear()
    evaluated(task, variables, data_set, full=False)
    # The images and the metrics of a VAE use the same latent samples.
    record.check(again=name == "vae")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "vae"])
def test_sampling_of_a_task_uses_each_key_for_one_purpose(name, record):
    task, (batch, _) = task_of(name), data()
    variables = first_variables(task, batch)
    jax.effects_barrier()
    record.sampled.clear()
    record.parents.clear()
    sample(task, variables, example_keys(purpose_key(0, SAMPLE), 0, batch.index))
    record.check()


def test_the_check_fails_if_a_key_is_used_twice(monkeypatch):
    record = Record()
    record.watch(monkeypatch)
    keys = jax.random.split(jax.random.key(0), 2)
    uniform_times(keys, jnp.arange(2), 2)
    record.check()
    uniform_times(keys, jnp.arange(2), 2)
    with pytest.raises(AssertionError):
        record.check()
