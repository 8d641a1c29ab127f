"""The loss of an evaluation is the objective of training, whatever the task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data import batches, loader, shapes
from ddpm_jax.data.types import Data, Split
from ddpm_jax.diffusion import losses as loss
from ddpm_jax.diffusion import schedules
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.parallel.sharding import make
from ddpm_jax.task import Evaluation
from ddpm_jax.tasks.autoencoder import autoencoder_task
from ddpm_jax.tasks.classifier import classifier_task
from ddpm_jax.tasks.contrastive import contrastive_task
from ddpm_jax.tasks.diffusion import diffusion_task
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vae import vae_task
from ddpm_jax.tasks.vdm import vdm_task
from ddpm_jax.variational.likelihoods import gaussian

SIZE, SHAPE, LEVELS, CLASSES = 64, (4, 4, 1), 17, 3
FAST = Sampling("ddim", 1)


def images(size=SIZE, shape=SHAPE, levels=LEVELS):
    """The same images as every split."""
    draws = np.random.default_rng(0)
    some = draws.integers(0, levels, (size, *shape)) * draws.uniform(0.2, 1, (size, 1, 1, 1))
    split = Split(some.astype(np.uint8), np.arange(size, dtype=np.int32) % CLASSES)
    return Data("x", "x", split, split, levels, ("a", "b", "c"), "", validation=split)


def pictures(altered=0):
    data = loader.load("shapes")
    split = shapes.with_altered(data, altered).train if altered else data.train
    split = split.rows(np.arange(SIZE))
    return data._replace(train=split, test=split, validation=split)


def dit(outputs=1, classes=CLASSES):
    return DiT(outputs=outputs, patch=2, width=8, depth=1, heads=1, classes=classes)


def vae():
    return vae_task(
        VAENetwork(SHAPE, 2, (8,)), gaussian(LEVELS, 0.5), beta=3.0, eval_batch=64, iwae_images=1
    )


def weighted():
    return diffusion_task(
        dit(), schedules.cosine(-6.0, 6.0), SHAPE, LEVELS, kind="v", weight=loss.v_weight,
        label_dropout=0.0, sampling=FAST, batch_size=16,
    )  # fmt: skip


def bounded():
    return diffusion_task(
        dit(2, 0), schedules.from_betas(np.linspace(1e-4, 0.02, 8)), SHAPE, LEVELS,
        variance="learned", times="importance", bound_scale=1.0, sampling=FAST, batch_size=16,
    )  # fmt: skip


def variational():
    return vdm_task(
        dit(1, 0), SHAPE, LEVELS, ends=(6.0, -4.0), sampling=FAST, batch_size=16, eval_batch=64,
        eval_times=8,
    )  # fmt: skip


def noisy():
    net = ClassifierNetwork(CLASSES, (4,), 4, 0.0, True)
    return classifier_task(net, SHAPE, LEVELS, schedule=schedules.cosine(), eval_batch=64)


def clean():
    return classifier_task(ClassifierNetwork(CLASSES, (4,), 4, 0.0), SHAPE, LEVELS, eval_batch=64)


def contrastive():
    net = DualEncoder("tiny", shapes.LENGTH, (8,), 8)
    return contrastive_task(net, (32, 32, 3), 256, batch_size=16)


def latent():
    return autoencoder_task(Autoencoder((4, 4, 1), (4, 4), 2), LEVELS, kl_weight=0.3)


def quantised():
    return autoencoder_task(Autoencoder((4, 4, 1), (4, 4), 2), LEVELS, codes=8, commitment=0.7)


TASKS = {
    "vae": (vae, images),
    "diffusion, weighted": (weighted, images),
    "diffusion, learned variance, importance-sampled times": (bounded, images),
    "vdm": (variational, images),
    "classifier": (clean, images),
    "classifier on noise": (noisy, images),
    "contrastive": (contrastive, pictures),
    "contrastive, altered captions": (contrastive, lambda: pictures(2)),
    "autoencoder": (latent, images),
    "autoencoder, quantised": (quantised, images),
}


FAST_ONES = ("diffusion, learned variance, importance-sampled times", "autoencoder")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST_ONES else pytest.mark.slow) for name in TASKS],
)
def test_the_loss_of_an_evaluation_is_that_of_training_with_frozen_parameters(name, monkeypatch):
    """So are all metrics that both report under one name, without dropout and augmentation."""
    for module in ("diffusion", "vdm"):  # no samples are needed here
        monkeypatch.setattr(f"ddpm_jax.tasks.{module}.show", lambda *_: Evaluation({}, {}))
    build, data = (of() for of in TASKS[name])
    task, passes, size = build, 24, 16
    batch = jax.tree.map(
        jnp.asarray, batches.batch_of(data.train, np.arange(SIZE), np.arange(SIZE))
    )

    @jax.jit
    def start():
        params, fixed = task.init(jax.random.key(0), batch)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [a + 0.2 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
        if "history" in fixed:  # as if some times had larger losses than others
            history = fixed["history"]
            rows = 1.0 + jnp.arange(len(history.counts))[:, None] * jnp.ones(history.losses.shape)
            fixed = {"history": loss.LossHistory(rows, history.counts + 10)}
        return jax.tree.unflatten(tree, moved), fixed

    @jax.jit
    def train(params, fixed):
        def one(key):
            order = jax.random.permutation(key, SIZE).reshape(-1, size)

            def part(rows):
                some = jax.tree.map(lambda a: a[rows], batch)._replace(index=jnp.arange(size))
                keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
                losses, parts, _ = task.loss(
                    params, fixed, some, keys, train=True, gather=lambda tree: tree
                )
                return {"loss": losses.mean(), **{k: v.mean() for k, v in parts.items()}}

            return jax.tree.map(lambda a: a.mean(), jax.lax.map(part, order))

        return jax.lax.map(one, jax.random.split(jax.random.key(2), passes))

    params, fixed = start()
    seen = {k: np.asarray(v, np.float64) for k, v in train(params, fixed).items()}
    found = task.evaluate(
        params, fixed, data, split="validation", seed=0, full=False, spread=make()
    ).metrics
    shared = [metric for metric in seen if metric in found]
    assert "loss" in shared
    for metric in shared:
        spread = seen[metric].std(ddof=1)  # of passes, each as long as the evaluation
        allowed = 4 * (spread * (1 + 1 / passes) ** 0.5) + 1e-5 * abs(found[metric])
        assert abs(seen[metric].mean() - found[metric]) < allowed, metric
    assert found["loss_error"] > 0
