"""The classifier's task, and the judge that a trained one makes of other models' images."""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import plots, task
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo
from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import Cosine, Schedule
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, AtLeast, AtMost, EvalBatch
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.per_example import per_example, spread_times
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.progress import tell
from ddpm_jax.task import Evaluation, Needs, Resources, Task

NOISE_LEVELS = 10  # of the table of a noisy classifier's accuracies


def classifier_task(
    net: ClassifierNetwork,
    shape: tuple[int, int, int],
    levels: int,
    *,
    shift: int = 0,
    schedule: Schedule | None = None,
    eval_batch: int = 500,
) -> Task:
    """Cross-entropy of the labels.

    With a schedule it is of p(y | x_t), t uniform, and guides what diffusion models draw
    (Dhariwal & Nichol 2021, sec. 4); the figures are then means over t.

    Args:
      shape, levels: of the images.
      shift: training images are moved by up to so many pixels either way.
      schedule: of the noise that images get, where the network is a noisy one.

    Raises:
      UserError: the data set has no labels.
    """
    if not net.classes:
        raise UserError("a classifier needs a data set with labels")
    if net.noisy != (schedule is not None):
        raise ValueError("a noisy classifier needs a schedule, and only a noisy one does")

    def init(key, batch: Batch):
        return net.init(key, to_images(batch.images[:1], levels)), {}

    def moved(key, image):
        high, width = image.shape[:2]
        padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
        row, column = jax.random.randint(key, (2,), 0, 2 * shift + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), (high, width, image.shape[2]))

    def nll_of(logits, labels):
        """Of each image; 0 of one without a class, which `labelled` leaves out beforehand."""
        place = jnp.maximum(labels, 0)[:, None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), place, 1)[:, 0]
        return jnp.where(labels < 0, 0.0, nll)

    def noised(x0, keys, t):
        assert schedule is not None
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
        return jax.vmap(q_sample)(x0, eps, schedule.logsnr(t))

    def loss(params, fixed, batch, keys, *, train, gather):
        del fixed, gather
        split = jax.vmap(lambda key: jax.random.split(key, 4 if schedule else 2))(keys)
        shift_keys, drop_keys, *noise_keys = jnp.moveaxis(split, 1, 0)
        images, t = batch.images, None
        if train and shift:
            images = jax.vmap(moved)(shift_keys, images)
        x = to_images(images, levels)
        if schedule:
            t = jax.vmap(jax.random.uniform)(noise_keys[0])
            x = noised(x, noise_keys[1], t)
        logits, _ = net.apply(params, x, drop_keys if train else None, t)
        right = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
        return nll_of(logits, batch.labels), {"accuracy": right}, {}

    def judged(params, batch, keys):
        """Of each image and, if noisy, of a time in each tenth of [0, 1]: [B, times]."""
        x0 = to_images(batch.images, levels)
        t_keys, eps_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        times = spread_times(batch.index, t_keys, NOISE_LEVELS) if schedule else None

        def at(number):
            x, t = x0, None
            if times is not None:
                t = times[:, number]
                x = noised(x0, jax.vmap(lambda key: jax.random.fold_in(key, number))(eps_keys), t)
            logits: Any = net.apply(params, x, None, t)[0]
            return nll_of(logits, batch.labels), logits.argmax(-1) == batch.labels

        nll, right = jax.lax.map(at, jnp.arange(NOISE_LEVELS if schedule else 1))
        return {"nll": nll.T, "right": right.T}

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        held_out = data.part(split)
        found = per_example(judged, held_out, eval_batch, seed, spread, params)
        metrics = averages({"loss": found["nll"], "accuracy": found["right"]})
        worst = np.argsort(-found["nll"].mean(1))[:40]
        images = to_images(held_out.rows(np.sort(worst)).images, levels)
        pictures: dict[str, Any] = {"hardest": plots.grid(images, columns=10)}
        if schedule:
            t, shares = np.arange(NOISE_LEVELS) / NOISE_LEVELS, found["right"].mean(0)
            names = [f"accuracy_t_{level:.1f}" for level in t]
            metrics |= averages(dict(zip(names, found["right"].T, strict=True)))
            pictures["levels"] = plots.lines(t, {"accuracy": shares}, "t", "By noise level")
        return Evaluation(metrics, pictures)

    def sample(params, fixed, keys, request, spread=None):
        raise UserError("a classifier draws no images; --mode=eval evaluates it")

    def guided(params, denoise, labels, scale):
        assert schedule is not None

        def log_likelihood(xt, logsnr):
            t = jnp.clip(schedule.time(logsnr), 0, 1)
            logits: Any = net.apply(params, xt, None, jnp.full(len(xt), t))[0]
            nll = nll_of(logits, jnp.minimum(labels, net.classes - 1))
            return jnp.where(labels < net.classes, -nll, 0.0)  # "no class" pulls nowhere

        return guidance.classifier(denoise, log_likelihood, scale)

    guide = task.Guide("classifier", guided, shape, net.classes) if schedule else None
    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample, guide)


def labelled(data: Data) -> Data:
    """Leave out the images without a class, from which a classifier learns nothing, and log it.

    Raises:
      UserError: a split has no others.
    """
    parts: dict[str, Any] = {}
    skipped = []
    for split in ("train", "validation", "test"):
        part = getattr(data, split)
        if part is None:
            continue
        labels = np.asarray(part.labels)
        kept = np.flatnonzero(labels >= 0)
        if not len(kept):
            raise UserError(
                f"none of the {len(labels)} {split} images of {data.title} has a class; a "
                "classifier needs some, in sub-folders that are named after their classes"
            )
        if len(kept) < len(labels):
            skipped.append(f"{len(labels) - len(kept)} {split}")
            parts[split] = part.subset(kept)
    if skipped:
        tell(f"{data.title}: skipped {' and '.join(skipped)} images that have no class")
    return data._replace(**parts)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier of images, clean or noisy; see `classifier_task`.

    Attributes:
      network: The network, whose last layer but one serves as features.
      shift: Pixels that training images are moved by at most, either way.
      schedule: Noise schedule of the images, of a classifier that guides diffusion models; none:
        the images are clean.
      eval_batch_size: Images of one batch of an evaluation.
      info: The data set.
    """

    network: ClassifierNetwork = ClassifierNetwork()
    shift: Annotated[int, AtLeast(0), AtMost(1000)] = 0
    schedule: Cosine | None = None
    eval_batch_size: EvalBatch = 500
    info: Annotated[DataInfo, BOUND] = UNBOUND

    provides: ClassVar[str] = "classifier"

    def needs(self) -> Needs:
        """Return the names of other runs: none."""
        return Needs()

    def fit_to(self, data: Data) -> "Classifier":
        """Return the settings as they fit a data set: as they are."""
        del data
        return self

    def adapt(self, data: Data) -> Data:
        """Return the data without the images that have no class."""
        return labelled(data)

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Classifier":
        """Return the task for a data set and a precision."""
        del batch_size
        network = self.network.clone(
            classes=info.classes,
            noisy=self.schedule is not None,
            dtype=inner_dtype(precision),
            parent=None,
        )
        return dataclasses.replace(self, network=network, info=info)

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task."""
        del resources
        return classifier_task(
            self.network,
            self.info.shape,
            self.info.levels,
            shift=self.shift,
            schedule=self.schedule.make() if self.schedule else None,
            eval_batch=self.eval_batch_size,
        )
