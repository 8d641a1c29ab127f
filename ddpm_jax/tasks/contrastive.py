"""The task that trains a text encoder and an image encoder to similar embeddings of each pair.

A pair is an image and its caption. The loss is that of CLIP (Radford et al. 2021, fig. 3). For
embeddings u_i of captions and v_i of images, both of norm 1, and a learned inverse temperature s:

    L_i = 1/2 [ -log softmax_j(s u_i.v_j)_i - log softmax_j(s v_i.u_j)_i ]                (1)

Equal captions are not negatives of each other. A bag of words is often enough to distinguish a
caption from the captions of other images. Therefore the second term can also compare each image
with hard negatives: copies of its caption with one wrong detail (Yuksekgonul et al. 2023).
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from ddpm_jax import plots
from ddpm_jax.data import shapes
from ddpm_jax.data.shape_negatives import with_hard_negatives
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo, info_of
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, AtLeast, AtMost, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.progress import log
from ddpm_jax.task import AllGather, Context, Evaluate, Evaluation, LossOutput, Task, Variables

CANDIDATES = 64  # number of images that the metric accuracy_among_64 compares with each caption

EVAL_BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Contrastive(Task):
    """A text encoder and an image encoder, trained by eq. (1) (Radford et al. 2021).

    The softmax is over the batch of all devices. Therefore gradient accumulation, which splits a
    batch, is not possible. Captions are tokens [B, L]; with n hard negatives after each caption
    they are tokens [B, 1 + n, L].

    Attributes:
      network: The networks of the text encoder and the image encoder.
      hard_negatives: Number of hard negatives for each image; 0 turns them off. A hard negative is
        a copy of the caption with one wrong detail. Only the data set shapes has hard negatives.
      info: Description of the data set: image shape, number of classes and caption length.
      batch_size: Number of pairs in one training step, over all devices.
    """

    network: DualEncoder = DualEncoder()
    hard_negatives: Annotated[int, AtLeast(0), AtMost(1000)] = 1
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    run_type: ClassVar[str] = "text encoder"

    def adapt_to(self, data: Data) -> "Contrastive":
        """Return the task, with hard_negatives=0 (which is logged) if the data set has none.

        Raises:
          UserError: If the data set has no captions.
        """
        check_captions(info_of(data))
        if not self.hard_negatives or shapes.is_shapes(data.name):
            return self
        log(
            f"hard_negatives is set to 0: data set {data.name} has no hard negatives (only shapes "
            "has them)"
        )
        return dataclasses.replace(self, hard_negatives=0)

    def prepare_data(self, data: Data) -> Data:
        """Return the data with hard negatives after the captions."""
        return with_hard_negatives(data, self.hard_negatives) if self.hard_negatives else data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Contrastive":
        """Return the task with its network set up for the caption length and the precision."""
        network = self.network.clone(
            length=info.caption_length, dtype=inner_dtype(precision), parent=None
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def check(self) -> None:
        """Check that the data set has captions and that the network can be built.

        Raises:
          UserError: If the data set has no captions.
          FieldError: If the network cannot be built.
        """
        check_captions(self.info)
        with section("network"):
            self.network.check()

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the initial parameters, which do not depend on the batch."""
        del batch
        tokens = jnp.zeros((1, self.network.length), jnp.uint8)
        return Variables(self.network.init(key, tokens, jnp.zeros((1, *self.info.shape))), {})

    def embed(
        self, params: PyTree, batch: Batch
    ) -> tuple[
        Float[Array, "batch d"],
        Float[Array, "batch d"],
        Float[Array, "batch n d"] | None,
        Float[Array, ""],
    ]:
        """Return the embeddings of captions, images and hard negatives, and the scale s of eq. (1).

        The third value is None if the batch has no hard negatives.
        """
        images = to_images(batch.images, self.info.levels)
        applied: PyTree = self.network.apply(params, positive_captions(batch.captions), images)
        text, image, scale = applied
        if batch.captions.ndim == 2:
            return text, image, None, scale
        negatives = batch.captions[:, 1:]
        flat = negatives.reshape(-1, negatives.shape[-1])
        vectors: PyTree = self.network.apply(params, flat, method="embed_text")
        return text, image, vectors.reshape(*negatives.shape[:2], -1), scale

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the loss of every pair, eq. (1), with the softmax over the pairs of all devices.

        Args:
          variables: The parameters of the two encoders and of the scale s.
          batch: Images with tokens of their captions and hard negatives.
          keys: Not used.
          train: Not used, since the networks have no dropout.
          all_gather: A function that concatenates arrays [B, ...] of all devices.
        """
        del keys, train
        text, image, negatives, scale = self.embed(variables.params, batch)
        captions = positive_captions(batch.captions)
        all_text, all_image, all_captions = all_gather((text, image, captions))
        same = (captions[:, None] == all_captions).all(-1)
        positions = batch.index % len(all_text)
        nll, correct = contrastive_nll(
            text, image, all_text, all_image, scale, positions, same, negatives
        )
        metrics = {"accuracy": correct.astype(nll.dtype), "scale": jnp.full_like(nll, scale)}
        if negatives is not None:
            metrics["hard_negative_accuracy"] = hard_negative_accuracy(text, image, negatives)
        return LossOutput(nll, metrics, {})

    def evaluations(self) -> "tuple[Evaluate[Contrastive], ...]":
        """Return the functions that compute the metrics and images of an evaluation."""
        return evaluate_pairs, nearest_images


def contrastive_nll(
    text: Float[Array, "batch d"],
    image: Float[Array, "batch d"],
    all_text: Float[Array, "all d"],
    all_image: Float[Array, "all d"],
    scale: Float[Array, ""],
    positions: Int[Array, "batch"],
    same: Bool[Array, "batch all"],
    negatives: Float[Array, "batch n d"] | None = None,
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Return the loss of each pair in nats, eq. (1), [B], and the correctness, [B].

    A pair is correct if no other image has a larger cosine with the caption than its own image.

    Args:
      text: Embeddings of the captions, of norm 1.
      image: Embeddings of their images, of norm 1.
      all_text: Embeddings of all captions that the images are compared with.
      all_image: Embeddings of all images that the captions are compared with.
      scale: The inverse temperature s.
      positions: The index of each pair in `all_text` and `all_image`.
      same: True at [i, j] if caption i equals caption j of `all_text`.
      negatives: Embeddings of the hard negatives of each image; if None, there are none.
    """
    positive = jnp.arange(len(all_text)) == positions[:, None]
    if negatives is None:
        negatives = jnp.zeros((len(text), 0, text.shape[1]))

    def nll(a: Array, b: Array, hard: Array) -> tuple[Array, Array]:
        logits = jnp.where(same & ~positive, -jnp.inf, scale * a @ b.T)
        hard_logits = scale * jnp.einsum("bd,bmd->bm", a, hard)
        total = jax.nn.logsumexp(jnp.concatenate([logits, hard_logits], 1), axis=1)
        return total - jnp.where(positive, logits, 0.0).sum(1), logits.argmax(1) == positions

    text_nll, correct = nll(text, all_image, negatives[:, :0])
    image_nll, _ = nll(image, all_text, negatives)
    return 0.5 * (text_nll + image_nll), correct


def hard_negative_accuracy(
    text: Float[Array, "batch d"],
    image: Float[Array, "batch d"],
    negatives: Float[Array, "batch n d"],
) -> Float[Array, "batch"]:
    """Return 1 for an image closer to its caption than to all its hard negatives, else 0."""
    nearest = jnp.einsum("bd,bmd->bm", image, negatives).max(1)
    return ((text * image).sum(1) > nearest).astype(jnp.float32)


def positive_captions(captions: PyTree) -> PyTree:
    """Return the tokens [B, L] of the true captions, without the hard negatives."""
    return captions if captions.ndim == 2 else captions[:, 0]


def embed(
    task: Contrastive, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return "text" and "image", the embeddings of every pair, by name.

    If there are hard negatives, also return "negatives" and "hard_negative_accuracy".

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of both encoders and of the scale s.
      batch: Images with their captions.
      keys: Not used.
    """
    del keys
    text, image, negatives, _ = task.embed(params, batch)
    pairs = {"text": text, "image": image}
    if negatives is None:
        return pairs
    correct = hard_negative_accuracy(text, image, negatives)
    return {**pairs, "negatives": negatives, "hard_negative_accuracy": correct}


def shared_embeddings(context: Context) -> dict[str, np.ndarray]:
    """Return the embeddings (see `embed`) of all pairs of the evaluated split."""
    return context.per_example(embed, context.held_out, EVAL_BATCH_SIZE, context.variables.params)


def temperature_scale(task: Contrastive, params: PyTree) -> Float[Array, ""]:
    """Return the inverse temperature s of eq. (1)."""
    applied: PyTree = task.network.apply(params, method="scale")
    scale: Array = applied
    return scale


def batch_nll(
    pairs: dict[str, Float[Array, "batch ..."]],
    captions: UInt8[Array, "batch length"],
    scale: Float[Array, ""],
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Return the loss [B] and the correctness [B] of the pairs of a batch, as `contrastive_nll`.

    Args:
      pairs: The embeddings that `embed` returns, by name.
      captions: The tokens of the captions [B, L].
      scale: The inverse temperature s.
    """
    text, image = pairs["text"], pairs["image"]
    same = (captions[:, None] == captions).all(-1)
    positions = jnp.arange(len(text))
    negatives = pairs.get("negatives")
    return contrastive_nll(text, image, text, image, scale, positions, same, negatives)


def split_nll(
    captions: UInt8[np.ndarray, "n length"],
    scale: Float[np.ndarray, ""],
    size: int,
    context: Context,
) -> tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Return the loss [N] and the correctness [N] of all pairs of a split, computed in batches.

    A batch has `size` consecutive pairs. The last batch is filled up with pairs from the beginning
    of the split.

    Args:
      captions: The tokens of the split's captions [N, L].
      scale: The inverse temperature s.
      size: The number of pairs in a batch, which are compared with each other.
      context: The evaluation context (`task.Context`).
    """
    vectors = dict(context.cached(shared_embeddings))
    vectors.pop("hard_negative_accuracy", None)
    count, parts, compiled = len(captions), [], context.compile(batch_nll)
    for start in range(0, count, size):
        rows = np.arange(start, start + size) % count
        pairs = {name: values[rows].astype(np.float32) for name, values in vectors.items()}
        arguments: PyTree = (pairs, captions[rows], scale)
        nll, correct = jax.tree.map(np.asarray, compiled(*arguments))
        parts.append((nll[: count - start], correct[: count - start]))
    nll, correct = (np.concatenate(values) for values in zip(*parts, strict=True))
    return nll, correct


def evaluate_pairs(task: Contrastive, context: Context) -> Evaluation:
    """Return the loss, the scale s, and the shares of captions whose image is the closest one."""
    held_out, values = context.held_out, context.cached(shared_embeddings)
    compiled = context.compile(temperature_scale, static_argnums=0)
    scale = np.asarray(compiled(task, context.variables.params))
    captions = positive_captions(held_out.rows(np.arange(len(held_out.images))).captions)
    nll, correct = split_nll(captions, scale, task.batch_size, context)
    negatives = {name: values[name] for name in ("hard_negative_accuracy",) if name in values}
    metrics = averages({"loss": nll, **negatives}) | {"scale": float(scale)}
    candidates = min(CANDIDATES, len(captions))
    if candidates > 1:
        _, correct_among = split_nll(captions, scale, candidates, context)
        metrics |= averages({"accuracy": correct, f"accuracy_among_{candidates}": correct_among})
    else:
        log("metric accuracy is left out: it needs at least 2 images, and the split has 1")
    about = {"loss": f"batches of {task.batch_size} out of {len(captions)} held-out pairs"}
    return Evaluation(metrics, about=about)


def nearest_images(task: Contrastive, context: Context) -> Evaluation:
    """Return an image grid: in each row, the image of a caption, then the 8 nearest images.

    The rows are the first ten captions. The nearest images are those with the largest cosine to the
    caption, among the first 500 images of the split.
    """
    images = to_images(np.asarray(context.held_out.first(500).images), task.info.levels)
    values = context.cached(shared_embeddings)
    similarity = values["text"][:10] @ values["image"][: len(images)].T
    nearest = np.argsort(-similarity, 1)[:, :8]
    rows = [np.concatenate([images[i : i + 1], images[nearest[i]]]) for i in range(len(nearest))]
    sheet = plots.grid(np.concatenate(rows), columns=1 + nearest.shape[1])
    return Evaluation(images={"nearest_images": sheet})


def check_captions(info: DataInfo) -> None:
    """Check that the data set has captions.

    Raises:
      UserError: If the data set has no captions.
    """
    if not info.caption_length:
        raise UserError(
            f"data set {info.name} has no captions, or only empty captions; text-to-image needs "
            "captions: give --config.data=shapes, or folder:PATH of images with captions"
        )
