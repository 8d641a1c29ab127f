"""The text encoder's task: captions and images that belong together are to lie together.

CLIP's loss (Radford et al. 2021, fig. 3), for unit vectors u_i of captions and v_i of images and
the inverse temperature s, which is learned:

    L_i = 1/2 [ -log softmax_j(s u_i.v_j)_i - log softmax_j(s v_i.u_j)_i ]                (1)

Captions that are the same are no negatives of each other.  To be told from other images' captions,
one need not be read as more than a bag of words; so each image may be compared, in the second term,
with captions beside its own that say one thing wrong (Yuksekgonul et al. 2023).
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
    altered: Float[Array, "batch more d"] | None = None,
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Eq. (1) in nats of each pair, and whether its image is the nearest to its caption.

    Args:
      text, image: unit vectors of the pairs; all_text, all_image: of all that they are compared
        with, where pair i is number own[i].
      same: which captions of all are equal to a pair's.
      altered: unit vectors of captions that do not fit the pair's image, if there are any.
    """
    mine = jnp.arange(len(all_text)) == own[:, None]
    beside = jnp.zeros((len(text), 0, text.shape[1])) if altered is None else altered

    def nll(a, b, more):
        logits = jnp.where(same & ~mine, -jnp.inf, scale * a @ b.T)
        more = scale * jnp.einsum("bd,bmd->bm", a, more)
        every = jax.nn.logsumexp(jnp.concatenate([logits, more], 1), axis=1)
        return every - jnp.where(mine, logits, 0.0).sum(1), logits.argmax(1) == own

    of_text, right = nll(text, all_image, beside[:, :0])
    of_image, _ = nll(image, all_text, beside)
    return 0.5 * (of_text + of_image), right


def contrastive_task(
    net: DualEncoder, shape: tuple[int, int, int], levels: int, *, eval_batch: int = 256
) -> Task:
    """Eq. (1) over a batch, on all devices; the parts of an accumulated batch would not do.

    Captions are tokens [B, L] or [B, 1 + more, L], the first an image's own, the others altered.

    Args:
      shape, levels: of the images.

    Raises:
      UserError: the network cannot be built.
    """
    net.check()

    def init(key, batch: Batch):
        tokens = jnp.zeros((1, net.length), jnp.uint8)
        return net.init(key, tokens, jnp.zeros((1, *shape))), {}

    def loss(params, fixed, batch, keys, *, train, gather):
        del fixed, keys, train
        mine, altered = _own(batch.captions), places_of_altered(params, batch.captions)
        text, image, scale = net.apply(params, mine, to_images(batch.images, levels))
        all_text, all_image, captions = gather((text, image, mine))
        same = (mine[:, None] == captions).all(-1)
        nll, right = contrastive_nll(
            text, image, all_text, all_image, scale, batch.index % len(all_text), same, altered
        )
        told = {"accuracy": right.astype(nll.dtype), "scale": jnp.full_like(nll, scale)}
        if altered is not None:
            told["told_apart"] = apart(text, image, altered)
        return nll, told, {}

    def places_of_altered(params, captions):
        if captions.ndim == 2:
            return None
        others = captions[:, 1:]
        found = net.apply(params, others.reshape(-1, others.shape[-1]), method="of_text")
        return found.reshape(*others.shape[:2], -1)

    def apart(text, image, altered):
        """Whether an image is nearer to its caption than to every altered one."""
        further = jnp.einsum("bd,bmd->bm", image, altered).max(1)
        return ((text * image).sum(1) > further).astype(jnp.float32)

    def place(params, batch, keys):
        del keys
        altered = places_of_altered(params, batch.captions)
        text, image, _ = net.apply(params, _own(batch.captions), to_images(batch.images, levels))
        found = {"text": text, "image": image}
        return found if altered is None else {**found, "apart": apart(text, image, altered)}

    def scale_of(params):
        scale: Any = net.apply(params, method="scale")
        return scale

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        del fixed
        held_out = data.part(split)
        found = per_example(place, held_out, eval_batch, seed, spread, params)
        scale = fetch(spread.compile(scale_of)(params))
        captions = _own(held_out.rows(np.arange(len(held_out.images))).captions)
        nll: list[np.ndarray] = []
        right: list[np.ndarray] = []
        among = spread.compile(contrastive_nll)
        count = max(len(captions) // AMONG, 1)
        for part in np.array_split(np.arange(len(captions)), count):
            text, image = (found[name][part].astype(np.float32) for name in ("text", "image"))
            same = (captions[part][:, None] == captions[part]).all(-1)
            one = among(text, image, text, image, scale, np.arange(len(part)), same)
            for values, more in zip((nll, right), fetch(one), strict=True):
                values.append(more)
        mean, error = average(np.concatenate(nll))
        accuracy = average(np.concatenate(right).astype(float))
        metrics = {
            "loss": mean,
            "loss_error": error,
            "accuracy": accuracy.mean,
            "accuracy_error": accuracy.error,
            "scale": float(scale),
        }
        if "apart" in found:
            share = average(found["apart"].astype(float))
            metrics |= {"told_apart": share.mean, "told_apart_error": share.error}
        return Evaluation(
            metrics,
            {"found": _found(found, held_out, data.levels)},
            {"accuracy": f"among {len(captions) // count} images"},
        )

    def _found(found, held_out, levels):
        """A row for each of some captions: its image, and the nearest ones among the first."""
        some = held_out.first(500)
        images = to_images(np.asarray(some.images), levels)
        nearest = np.argsort(-found["text"][:10] @ found["image"][: len(images)].T, 1)[:, :8]
        rows = [
            np.concatenate([images[i : i + 1], images[nearest[i]]]) for i in range(len(nearest))
        ]
        return report.grid(np.concatenate(rows), columns=1 + nearest.shape[1])

    def sample(params, fixed, keys, request, spread=None):
        raise UserError("a text encoder draws no images; --mode=eval evaluates it")

    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample)


def _own(captions: Any) -> Any:
    """Tokens of images' own captions, whether altered ones are beside them or not."""
    return captions if captions.ndim == 2 else captions[:, 0]


def image_judge(name: str, net: DualEncoder, params: Any) -> Judge:
    """The judge in whose features, the image tower's, distances are told; it knows one class."""

    def network(params, x):
        features = net.apply(params, x, method="of_image")
        return jnp.zeros((len(x), 1)), features

    return judge_of(name, network, params)
