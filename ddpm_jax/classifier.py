"""The classifier's task, and the judge that a trained one makes of other models' images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddpm_jax import report
from ddpm_jax.data.loader import Batch, Data
from ddpm_jax.errors import UserError
from ddpm_jax.evaluate import average, per_example
from ddpm_jax.nn.classifier import Classifier
from ddpm_jax.parallel import fetch, make
from ddpm_jax.tasks import Evaluation, Task, to_images


class Judge(NamedTuple):
    """A trained classifier: `see` maps images [N, H, W, C] in [-1, 1] to (features, log p(y|x)).

    `name` is what a distance in its features is called after.
    """

    name: str
    see: Callable[[Any], tuple[np.ndarray, np.ndarray]]


def classifier_task(net: Classifier, levels: int, *, shift: int = 0, eval_batch: int = 500) -> Task:
    """Cross-entropy of the labels.

    Args:
      shift: training images are moved by up to so many pixels either way.

    Raises:
      UserError: the data set has no labels.
    """
    if not net.classes:
        raise UserError("a classifier needs a data set with labels")

    def init(key, batch: Batch):
        return net.init(key, to_images(batch.images[:1], levels)), {}

    def moved(key, image):
        high, width = image.shape[:2]
        padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
        row, column = jax.random.randint(key, (2,), 0, 2 * shift + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), (high, width, image.shape[2]))

    def nll_of(logits, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]

    def loss(params, fixed, batch, keys, *, train, gather):
        del fixed, gather
        shift_keys, drop_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        images = batch.images
        if train and shift:
            images = jax.vmap(moved)(shift_keys, images)
        logits, _ = net.apply(params, to_images(images, levels), drop_keys if train else None)
        right = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
        return nll_of(logits, batch.labels), {"accuracy": right}, {}

    @jax.jit
    def judged(params, batch):
        logits: Any = net.apply(params, to_images(batch.images, levels))[0]
        return {
            "nll": nll_of(logits, batch.labels),
            "right": logits.argmax(-1) == batch.labels,
        }

    def evaluate(params, fixed, data: Data, *, seed, full, spread):
        found = per_example(
            lambda batch, keys: judged(params, batch), data.test, eval_batch, seed, spread
        )
        nll, right = average(found["nll"]), average(found["right"])
        metrics = {
            "test/loss": nll.mean,
            "test/accuracy": right.mean,
            "test/accuracy_error": right.error,
        }
        worst = np.argsort(-found["nll"])[:40]
        images = to_images(data.test.images[np.sort(worst)], levels)
        return Evaluation(metrics, {"hardest": report.grid(images, columns=10)})

    def sample(params, fixed, keys, request):
        raise UserError("a classifier draws no images; --mode=eval evaluates it")

    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample)


def judge_of(
    name: str,
    network: Callable[[Any, Float[Array, "batch h w c"]], tuple[Array, Array]],
    params: Any,
    batch_size: int = 500,
) -> Judge:
    """The judge that `network(params, images in [-1, 1]) -> (logits, features)` makes."""

    @jax.jit
    def forward(params, x):
        logits, features = network(params, x)
        return features, jax.nn.log_softmax(logits)

    def see(images):
        spread, found = make(), []
        size = spread.round_up(batch_size)
        for start in range(0, len(images), size):  # one shape, compiled once
            part = np.asarray(images[start : start + size], np.float32)
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part), 0)])
            seen = fetch(forward(params, spread.shard(filled[spread.rows(size)])))
            found.append([a.astype(np.float64)[: len(part)] for a in seen])
        features, logs = zip(*found, strict=True)
        return np.concatenate(features), np.concatenate(logs)

    return Judge(name, see)
