"""The task of a text encoder: embeddings of captions and of their images are to be similar.

CLIP's loss (Radford et al. 2021, fig. 3), for unit vectors u_i of captions and v_i of images and
the inverse temperature s, which is learned:

    L_i = 1/2 [ -log softmax_j(s u_i.v_j)_i - log softmax_j(s v_i.u_j)_i ]                (1)

Captions that are the same are not negatives of each other. To distinguish a caption from those of
other images, a network need not read more than a bag of words; so each image may be compared, in
the second term, with hard negatives: captions with one thing wrong (Yuksekgonul et al. 2023).
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

AMONG = 64  # images among which that of a caption is searched, whatever the size of a batch

EVAL_BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Contrastive(Task):
    """CLIP's loss of captions and images (Radford et al. 2021), eq. (1) over a whole batch.

    The batch is that of all devices; the parts of an accumulated batch would not do. Captions are
    tokens [B, L], or [B, 1 + n, L]: an image's caption, then its n hard negatives.

    Attributes:
      network: Text encoder and image tower.
      hard_negatives: Captions with one thing wrong beside each image's own (shapes alone has them).
      info: The data set.
      batch_size: Training images of one step, which are compared with each other.
    """

    network: DualEncoder = DualEncoder()
    hard_negatives: Annotated[int, AtLeast(0), AtMost(1000)] = 1
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    provides: ClassVar[str] = "text encoder"

    def fit_to(self, data: Data) -> "Contrastive":
        """Return the settings without hard negatives where the data set has none.

        Raises:
          UserError: the data set has no captions.
        """
        check_captions(info_of(data))
        if not self.hard_negatives or shapes.is_named(data.name):
            return self
        log(f"no hard negatives: data set {data.name} has none, shapes alone does")
        return dataclasses.replace(self, hard_negatives=0)

    def adapt(self, data: Data) -> Data:
        """Return the data with hard negatives beside the captions."""
        return with_hard_negatives(data, self.hard_negatives) if self.hard_negatives else data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Contrastive":
        """Return the task for a data set, a precision and a batch size."""
        network = self.network.clone(
            length=info.caption_length, dtype=inner_dtype(precision), parent=None
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def check(self) -> None:
        """Check that there are captions and that the network can be built.

        Raises:
          UserError: the data set has no captions.
          FieldError: the network cannot be built.
        """
        check_captions(self.info)
        with section("network"):
            self.network.check()

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the first parameters; they do not depend on the batch."""
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
        """Return unit vectors of captions, images and hard negatives, and the scale s of eq. (1).

        Without hard negatives there is None in their place.
        """
        images = to_images(batch.images, self.info.levels)
        applied: PyTree = self.network.apply(params, captions_alone(batch.captions), images)
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
        """Return eq. (1) of every pair, which is compared with those of all devices.

        Args:
          variables, batch, keys, train, all_gather: see `Task.loss`.
        """
        del keys, train
        text, image, negatives, scale = self.embed(variables.params, batch)
        captions = captions_alone(batch.captions)
        all_text, all_image, all_captions = all_gather((text, image, captions))
        same = (captions[:, None] == all_captions).all(-1)
        positions = batch.index % len(all_text)
        nll, correct = contrastive_nll(
            text, image, all_text, all_image, scale, positions, same, negatives
        )
        metrics = {"accuracy": correct.astype(nll.dtype), "scale": jnp.full_like(nll, scale)}
        if negatives is not None:
            metrics["hard_negative_accuracy"] = beats_negatives(text, image, negatives)
        return LossOutput(nll, metrics, {})

    def evaluations(self) -> "tuple[Evaluate[Contrastive], ...]":
        """Return the functions that evaluate the task."""
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
    """Return eq. (1) in nats of each pair, and whether its image is the nearest to its caption.

    Args:
      text: unit vectors of the captions.
      image: unit vectors of their images.
      all_text: unit vectors of all captions that the images are compared with.
      all_image: unit vectors of all images that the captions are compared with.
      scale: inverse temperature s.
      positions: pair i is number positions[i] of all.
      same: which captions of all are equal to a pair's.
      negatives: unit vectors of captions that do not fit the pair's image; None: there are none.
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


def beats_negatives(
    text: Float[Array, "batch d"],
    image: Float[Array, "batch d"],
    negatives: Float[Array, "batch n d"],
) -> Float[Array, "batch"]:
    """Return 1 where an image is nearer to its caption than to every hard negative, else 0."""
    nearest = jnp.einsum("bd,bmd->bm", image, negatives).max(1)
    return ((text * image).sum(1) > nearest).astype(jnp.float32)


def captions_alone(captions: PyTree) -> PyTree:
    """Return the tokens [B, L] of images' captions, without the hard negatives beside them."""
    return captions if captions.ndim == 2 else captions[:, 0]


def embed(
    task: Contrastive, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the unit vectors of every pair, with hard negatives if there are any.

    Args:
      task: the task.
      params: of both encoders and the scale.
      batch: images with their captions.
      keys: not used.
    """
    del keys
    text, image, negatives, _ = task.embed(params, batch)
    pairs = {"text": text, "image": image}
    if negatives is None:
        return pairs
    correct = beats_negatives(text, image, negatives)
    return {**pairs, "negatives": negatives, "hard_negative_accuracy": correct}


def embeddings(context: Context) -> dict[str, np.ndarray]:
    """Return what `embed` returns of the split that is evaluated."""
    return context.per_example(embed, context.held_out, EVAL_BATCH_SIZE, context.variables.params)


def temperature_scale(task: Contrastive, params: PyTree) -> Float[Array, ""]:
    """Return the inverse temperature s of eq. (1)."""
    applied: PyTree = task.network.apply(params, method="scale")
    scale: Array = applied
    return scale


def compare(
    pairs: dict[str, Float[Array, "batch ..."]],
    captions: UInt8[Array, "batch length"],
    scale: Float[Array, ""],
) -> tuple[Float[Array, "batch"], Bool[Array, "batch"]]:
    """Return what `contrastive_nll` does of pairs that are compared with each other.

    Args:
      pairs: unit vectors by name, as `embed` returns them.
      captions: tokens.
      scale: inverse temperature.
    """
    text, image = pairs["text"], pairs["image"]
    same = (captions[:, None] == captions).all(-1)
    positions = jnp.arange(len(text))
    negatives = pairs.get("negatives")
    return contrastive_nll(text, image, text, image, scale, positions, same, negatives)


def compare_among(
    captions: UInt8[np.ndarray, "n length"],
    scale: Float[np.ndarray, ""],
    size: int,
    context: Context,
) -> tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Return what `compare` does of every pair, among `size` pairs in the order of the split.

    The last pairs are compared with the first ones, too; fewer than `size` pairs are repeated,
    as they are in a batch of so small a training set.

    Args:
      captions: tokens of the split.
      scale: inverse temperature.
      size: pairs that are compared with each other.
      context: of the evaluation.
    """
    vectors = {k: v for k, v in context.shared(embeddings).items() if k != "hard_negative_accuracy"}
    count, parts, compiled = len(captions), [], context.compile(compare)
    for start in range(0, count, size):
        rows = np.arange(start, start + size) % count
        pairs = {name: values[rows].astype(np.float32) for name, values in vectors.items()}
        arguments: PyTree = (pairs, captions[rows], scale)
        nll, correct = jax.tree.map(np.asarray, compiled(*arguments))
        parts.append((nll[: count - start], correct[: count - start]))
    return np.concatenate([nll for nll, _ in parts]), np.concatenate([right for _, right in parts])


def evaluate_pairs(task: Contrastive, context: Context) -> Evaluation:
    """Return the loss, the scale, and how often the right image is the nearest to its caption."""
    held_out, values = context.held_out, context.shared(embeddings)
    compiled = context.compile(temperature_scale, static_argnums=0)
    scale = np.asarray(compiled(task, context.variables.params))
    captions = captions_alone(held_out.rows(np.arange(len(held_out.images))).captions)
    nll, correct = compare_among(captions, scale, task.batch_size, context)
    negatives = {name: values[name] for name in ("hard_negative_accuracy",) if name in values}
    metrics = averages({"loss": nll, **negatives}) | {"scale": float(scale)}
    fewer = min(AMONG, len(captions))
    if fewer > 1:
        among = compare_among(captions, scale, fewer, context)[1]
        metrics |= averages({"accuracy": correct, f"accuracy_among_{fewer}": among})
    else:
        log("accuracy is left out: a caption needs at least 2 images to be found among")
    about = {"loss": f"among {task.batch_size} pairs of {len(captions)} held-out ones"}
    return Evaluation(metrics, about=about)


def nearest_images(task: Contrastive, context: Context) -> Evaluation:
    """Return a row for each of ten captions: its image, then the nearest ones of the first 500."""
    images = to_images(np.asarray(context.held_out.first(500).images), task.info.levels)
    values = context.shared(embeddings)
    similarity = values["text"][:10] @ values["image"][: len(images)].T
    nearest = np.argsort(-similarity, 1)[:, :8]
    rows = [np.concatenate([images[i : i + 1], images[nearest[i]]]) for i in range(len(nearest))]
    sheet = plots.grid(np.concatenate(rows), columns=1 + nearest.shape[1])
    return Evaluation(images={"found": sheet})


def check_captions(info: DataInfo) -> None:
    """Check that the data set has captions.

    Raises:
      UserError: it has none.
    """
    if not info.caption_length:
        raise UserError(
            f"data set {info.name} has no captions, or empty ones alone; text-to-image needs a "
            "captioned one, such as shapes, or folder:PATH of images with captions"
        )
