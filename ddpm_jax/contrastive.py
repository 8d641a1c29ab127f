"""The text encoder's task: captions and images that belong together are to lie together.

CLIP's loss (Radford et al. 2021, fig. 3), for unit vectors u_i of captions and v_i of images and
the inverse temperature s, which is learned:

    L_i = 1/2 [ -log softmax_j(s u_i.v_j)_i - log softmax_j(s v_i.u_j)_i ]                (1)

Captions that are the same are no negatives of each other.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax import report
from ddpm_jax.classifier import Judge, judge_of
from ddpm_jax.data.loader import Batch, Data
from ddpm_jax.errors import UserError
from ddpm_jax.evaluate import average, per_example
from ddpm_jax.nn.text import DualEncoder
from ddpm_jax.parallel import fetch
from ddpm_jax.tasks import Evaluation, Task, to_images

AMONG = 64  # images that a caption is to be found among, in evaluation


def contrastive_nll(
    text: Float[Array, "batch d"],
    image: Float[Array, "batch d"],
    all_text: Float[Array, "all d"],
    all_image: Float[Array, "all d"],
    scale: Float[Array, ""],
    own: Int[Array, "batch"],
    same: Bool[Array, "batch all"],
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Eq. (1) in nats of each pair, and whether its image is the nearest to its caption.

    Args:
      text, image: unit vectors of the pairs; all_text, all_image: of all that they are compared
        with, where pair i is number own[i].
      same: which captions of all are equal to a pair's.
    """
    mine = jnp.arange(len(all_text)) == own[:, None]

    def nll(a, b):
        logits = jnp.where(same & ~mine, -jnp.inf, scale * a @ b.T)
        return -jnp.where(mine, jax.nn.log_softmax(logits), 0.0).sum(1), logits.argmax(1) == own

    (of_text, right), (of_image, _) = nll(text, all_image), nll(image, all_text)
    return 0.5 * (of_text + of_image), right


def contrastive_task(
    net: DualEncoder, shape: tuple[int, int, int], levels: int, *, eval_batch: int = 256
) -> Task:
    """Eq. (1) over a batch, on all devices; the parts of an accumulated batch would not do.

    Args:
      shape, levels: of the images.
    """

    def init(key, batch: Batch):
        tokens = jnp.zeros((1, net.length), jnp.uint8)
        return net.init(key, tokens, jnp.zeros((1, *shape))), {}

    def loss(params, fixed, batch, keys, *, train, gather):
        del fixed, keys, train
        text, image, scale = net.apply(params, batch.captions, to_images(batch.images, levels))
        all_text, all_image, captions = gather((text, image, batch.captions))
        same = (batch.captions[:, None] == captions).all(-1)
        nll, right = contrastive_nll(
            text, image, all_text, all_image, scale, batch.index % len(all_text), same
        )
        told = {"accuracy": right.astype(nll.dtype), "scale": jnp.full_like(nll, scale)}
        return nll, told, {}

    @jax.jit
    def place(params, batch):
        text, image, _ = net.apply(params, batch.captions, to_images(batch.images, levels))
        return {"text": text, "image": image}

    def evaluate(params, fixed, data: Data, *, seed, full, spread):
        del fixed
        found = per_example(
            lambda batch, keys: place(params, batch), data.test, eval_batch, seed, spread
        )
        scale: Any = net.apply(params, method="scale")
        captions = data.test.rows(np.arange(len(data.test.images))).captions
        nll, right = [], []
        count = max(len(captions) // AMONG, 1)
        for part in np.array_split(np.arange(len(captions)), count):
            text, image = (jnp.asarray(found[name][part]) for name in ("text", "image"))
            same = jnp.asarray((captions[part][:, None] == captions[part]).all(-1))
            one = contrastive_nll(text, image, text, image, scale, jnp.arange(len(part)), same)
            nll.append(fetch(one[0]))
            right.append(fetch(one[1]))
        mean, error = average(np.concatenate(nll))
        accuracy = average(np.concatenate(right).astype(float))
        metrics = {
            "test/loss": mean,
            "test/loss_error": error,
            "test/accuracy": accuracy.mean,
            "test/accuracy_error": accuracy.error,
            "test/scale": float(scale),
        }
        return Evaluation(
            metrics, {"found": _found(found, data)}, {"accuracy": f"among {AMONG} images"}
        )

    def _found(found, data):
        """A row for each of some captions: its image, and the nearest ones among the first."""
        some = data.test.first(500)
        images = to_images(np.asarray(some.images), data.levels)
        nearest = np.argsort(-found["text"][:10] @ found["image"][: len(images)].T, 1)[:, :8]
        rows = [
            np.concatenate([images[i : i + 1], images[nearest[i]]]) for i in range(len(nearest))
        ]
        return report.grid(np.concatenate(rows), columns=1 + nearest.shape[1])

    def sample(params, fixed, keys, request):
        raise UserError("a text encoder draws no images; --mode=eval evaluates it")

    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample)


def image_judge(name: str, net: DualEncoder, params: Any) -> Judge:
    """The judge in whose features, the image tower's, distances are told; it knows one class."""

    def network(params, x):
        features = net.apply(params, x, method="of_image")
        return jnp.zeros((len(x), 1)), features

    return judge_of(name, network, params)
