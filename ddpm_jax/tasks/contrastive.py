"""The text encoder's task: captions and images that belong together are to lie together.

CLIP's loss (Radford et al. 2021, fig. 3), for unit vectors u_i of captions and v_i of images and
the inverse temperature s, which is learned:

    L_i = 1/2 [ -log softmax_j(s u_i.v_j)_i - log softmax_j(s v_i.u_j)_i ]                (1)

Captions that are the same are no negatives of each other.  To be told from other images' captions,
one need not be read as more than a bag of words; so each image may be compared, in the second term,
with captions beside its own that say one thing wrong (Yuksekgonul et al. 2023).
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax import plots
from ddpm_jax.data import shapes
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo, info_of
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, AtLeast, AtMost, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.parallel.sharding import Parallel, fetch
from ddpm_jax.progress import tell
from ddpm_jax.task import Evaluation, Needs, Resources, Task

AMONG = 64  # images that a caption is to be found among, whatever the size of a batch


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
    net: DualEncoder,
    shape: tuple[int, int, int],
    levels: int,
    *,
    batch_size: int,
    eval_batch: int = 256,
) -> Task:
    """Eq. (1) over a batch, on all devices; the parts of an accumulated batch would not do.

    Captions are tokens [B, L] or [B, 1 + more, L], the first an image's own, the others altered.

    Args:
      shape, levels: of the images.
      batch_size: of training: held-out pairs, too, are compared with as many.

    Raises:
      FieldError: the network cannot be built.
    """
    with section("network"):
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
        if altered is None:
            return found
        return {**found, "altered": altered, "told_apart": apart(text, image, altered)}

    def compared(found, captions, scale):
        """(nll, right) of pairs that are compared with each other."""
        text, image = found["text"], found["image"]
        same = (captions[:, None] == captions).all(-1)
        numbers = jnp.arange(len(text))
        return contrastive_nll(text, image, text, image, scale, numbers, same, found.get("altered"))

    def among(found, captions, scale, size: int, spread: Parallel) -> tuple[np.ndarray, np.ndarray]:
        """(nll, right) of every pair, compared with `size` pairs in the order of the split.

        The last pairs are compared with the first ones, too; fewer than `size` pairs are repeated,
        as they are in a batch of so small a training set.
        """
        count, parts, compiled = len(captions), [], spread.compile(compared)
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count
            some = {name: values[rows].astype(np.float32) for name, values in found.items()}
            part = fetch(compiled(some, captions[rows], scale))
            parts.append([values[: count - start] for values in part])
        nll, right = (np.concatenate(values) for values in zip(*parts, strict=True))
        return nll, right

    def scale_of(params):
        scale: Any = net.apply(params, method="scale")
        return scale

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        del fixed
        held_out = data.part(split)
        found = per_example(place, held_out, eval_batch, seed, spread, params)
        scale = fetch(spread.compile(scale_of)(params))
        captions = _own(held_out.rows(np.arange(len(held_out.images))).captions)
        told_apart = {name: found.pop(name) for name in ("told_apart",) if name in found}
        nll, right = among(found, captions, scale, batch_size, spread)
        metrics = averages({"loss": nll, **told_apart}) | {"scale": float(scale)}
        fewer = min(AMONG, len(captions))
        if fewer > 1:
            few = among(found, captions, scale, fewer, spread)[1]
            metrics |= averages({"accuracy": right, f"accuracy_among_{fewer}": few})
        else:
            tell("accuracy is left out: a caption needs at least 2 images to be found among")
        about = {"loss": f"among {batch_size} pairs of {len(captions)} held-out ones"}
        return Evaluation(metrics, {"found": _found(found, held_out, data.levels)}, about)

    def _found(found, held_out, levels):
        """A row for each of some captions: its image, and the nearest ones among the first."""
        some = held_out.first(500)
        images = to_images(np.asarray(some.images), levels)
        nearest = np.argsort(-found["text"][:10] @ found["image"][: len(images)].T, 1)[:, :8]
        rows = [
            np.concatenate([images[i : i + 1], images[nearest[i]]]) for i in range(len(nearest))
        ]
        return plots.grid(np.concatenate(rows), columns=1 + nearest.shape[1])

    def sample(params, fixed, keys, request, spread=None):
        raise UserError("a text encoder draws no images; --mode=eval evaluates it")

    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample)


def _own(captions: Any) -> Any:
    """Tokens of images' own captions, whether altered ones are beside them or not."""
    return captions if captions.ndim == 2 else captions[:, 0]


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """CLIP's loss of captions and images (Radford et al. 2021); see `contrastive_task`.

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

    def needs(self) -> Needs:
        """Return the names of other runs: none."""
        return Needs()

    def fit_to(self, data: Data) -> "Contrastive":
        """Return the settings without hard negatives where the data set has none.

        Raises:
          UserError: the data set has no captions.
        """
        check_captions(info_of(data))
        if not self.hard_negatives or shapes.is_named(data.name):
            return self
        tell(f"no hard negatives: data set {data.name} has none, shapes alone does")
        return dataclasses.replace(self, hard_negatives=0)

    def adapt(self, data: Data) -> Data:
        """Return the data with hard negatives beside the captions."""
        return shapes.with_altered(data, self.hard_negatives) if self.hard_negatives else data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Contrastive":
        """Return the task for a data set, a precision and a batch size."""
        network = self.network.clone(
            length=info.caption_length, dtype=inner_dtype(precision), parent=None
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task.

        Raises:
          UserError: the data set has no captions.
          FieldError: the network cannot be built.
        """
        del resources
        check_captions(self.info)
        return contrastive_task(
            self.network, self.info.shape, self.info.levels, batch_size=self.batch_size
        )


def check_captions(info: DataInfo) -> None:
    """Raises UserError unless the data set has captions."""
    if not info.caption_length:
        raise UserError(
            f"data set {info.name} has no captions, or empty ones alone; text-to-image needs a "
            "captioned one, such as shapes, or folder:PATH of images with captions"
        )
