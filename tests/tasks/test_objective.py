"""Tests, for every task, that the loss of an evaluation is the objective of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data import batches, loader, shape_negatives, shapes
from ddpm_jax.data.types import Data, Split
from ddpm_jax.diffusion import schedules
from ddpm_jax.diffusion.times import LossHistory
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.task import Variables
from ddpm_jax.tasks.autoencoder import LatentAutoencoder
from ddpm_jax.tasks.classifier import Classifier
from ddpm_jax.tasks.contrastive import Contrastive
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_denoiser import SampleEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.tasks.vdm import VDM
from ddpm_jax.variational.likelihoods import Gaussian
from helpers.metric_table import undefined
from helpers.sampling import evaluated
from helpers.tasks import CutCosine, EvenBetas, bound, loss_of

SIZE, SHAPE, LEVELS, CLASSES = 64, (4, 4, 1), 17, 3
FAST = Sampling("ddim", 1)


def images(size=SIZE, shape=SHAPE, levels=LEVELS):
    """Return a data set with the same images in all splits."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, levels, (size, *shape)) * rng.uniform(0.2, 1, (size, 1, 1, 1))
    split = Split(pixels.astype(np.uint8), np.arange(size, dtype=np.int32) % CLASSES)
    return Data("x", "x", split, split, levels, ("a", "b", "c"), "", validation=split)


def captioned_images(negatives=0):
    """Return `SIZE` images of shapes, with `negatives` hard negatives, in all splits."""
    data = loader.load("shapes")
    split = shape_negatives.with_hard_negatives(data, negatives).train if negatives else data.train
    split = split.rows(np.arange(SIZE))
    return data._replace(train=split, test=split, validation=split)


def small(task, classes=CLASSES):
    """Return the task bound to `images`, in batches of 16."""
    return bound(task, SHAPE, LEVELS, classes, batch_size=16)


def dit():
    return DiT(patch=2, width=8, depth=1, heads=1)


def vae():
    return small(VAE(VAENetwork(SHAPE, 2, (8,)), Gaussian(0.5), 3.0, 64, iwae_images=1))


def weighted():
    return small(
        Diffusion(
            dit(), CutCosine(-6.0, 6.0), "v", loss_weight="v", label_dropout=0.0, sampling=FAST
        )
    )


def bounded():
    task = Diffusion(
        dit(), EvenBetas(8), variance="learned", vlb_weight=1.0, times="importance", sampling=FAST
    )
    return small(task, classes=0)


def variational():
    evaluation = SampleEvaluation(64, 8)
    return small(VDM(dit(), 6.0, -4.0, sampling=FAST, evaluation=evaluation), classes=0)


def noisy():
    network = ClassifierNetwork(channels=(4,), features=4, dropout=0.0)
    return small(Classifier(network, schedule=schedules.Cosine(), eval_batch_size=64))


def clean():
    network = ClassifierNetwork(channels=(4,), features=4, dropout=0.0)
    return small(Classifier(network, eval_batch_size=64))


def contrastive(hard_negatives=0):
    task = Contrastive(DualEncoder("tiny", 0, (8,), 8), hard_negatives)
    return bound(task, (32, 32, 3), 256, batch_size=16, caption_length=shapes.LENGTH)


def latent():
    return small(LatentAutoencoder(Autoencoder(channels=(4, 4), latent_channels=2), 0.3))


def quantised():
    network = Autoencoder(channels=(4, 4), latent_channels=2)
    return small(LatentAutoencoder(network, codes=8, commitment_weight=0.7))


TASKS = {
    "vae": (vae, images),
    "diffusion, weighted": (weighted, images),
    "diffusion, learned variance, importance-sampled times": (bounded, images),
    "vdm": (variational, images),
    "classifier": (clean, images),
    "classifier on noise": (noisy, images),
    "contrastive": (contrastive, captioned_images),
    "contrastive, hard negatives": (lambda: contrastive(2), lambda: captioned_images(2)),
    "autoencoder": (latent, images),
    "autoencoder, quantised": (quantised, images),
}


FAST_TASKS = ("diffusion, learned variance, importance-sampled times", "autoencoder")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST_TASKS else pytest.mark.slow) for name in TASKS],
)
def test_the_loss_of_an_evaluation_is_that_of_training_with_frozen_parameters(name, monkeypatch):
    """All metrics with the same name agree, too, without dropout and augmentation."""
    for module in ("diffusion", "vdm"):  # this test needs no samples
        monkeypatch.setattr(f"ddpm_jax.tasks.{module}.SAMPLE_EVALUATIONS", ())
    task, data = (make() for make in TASKS[name])
    passes, size = 24, 16
    batch = jax.tree.map(
        jnp.asarray, batches.batch_of(data.train, np.arange(SIZE), np.arange(SIZE))
    )

    @jax.jit
    def start():
        params, extra = task.init(jax.random.key(0), batch)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [a + 0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
        if "history" in extra:  # some times have larger losses than others
            history = extra["history"]
            rows = 1.0 + jnp.arange(len(history.counts))[:, None] * jnp.ones(history.losses.shape)
            extra = {"history": LossHistory(rows, history.counts + 10)}
        return Variables(jax.tree.unflatten(tree, moved), extra)

    @jax.jit
    def train(variables):
        def train_pass(key):
            order = jax.random.permutation(key, SIZE).reshape(-1, size)

            def step(rows):
                part = jax.tree.map(lambda a: a[rows], batch)._replace(index=jnp.arange(size))
                keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
                losses, parts, _ = loss_of(task, variables, part, keys)
                return {"loss": losses.mean(), **{k: v.mean() for k, v in parts.items()}}

            return jax.tree.map(lambda a: a.mean(), jax.lax.map(step, order))

        return jax.lax.map(train_pass, jax.random.split(jax.random.key(2), passes))

    variables = start()
    trained = {k: np.asarray(v, np.float64) for k, v in train(variables).items()}
    metrics = evaluated(task, variables, data, split="validation", full=False).metrics
    metrics = {name.removeprefix("validation/"): value for name, value in metrics.items()}
    shared = [metric for metric in trained if metric in metrics]
    assert "loss" in shared
    assert not undefined([*trained, *metrics])
    for metric in shared:
        std = trained[metric].std(ddof=1)  # over passes, each of as many examples as an evaluation
        allowed = 4 * (std * (1 + 1 / passes) ** 0.5) + 1e-5 * abs(metrics[metric])
        assert abs(trained[metric].mean() - metrics[metric]) < allowed, metric
    assert metrics["loss_error"] > 0
