"""The task of a classifier of images, clean ones or noisy ones."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo, Split
from ddpm_jax.diffusion.guidance import ClassifierGuidance
from ddpm_jax.diffusion.schedules import Cosine
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, AtLeast, AtMost, EvalBatch
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.per_example import evaluation_times
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.progress import log
from ddpm_jax.rng import split_keys
from ddpm_jax.task import AllGather, Context, Evaluate, Evaluation, LossOutput, Task, Variables
from ddpm_jax.tasks.denoising import corrupt

NOISE_LEVELS = 10  # of the table of a noisy classifier's accuracies


@dataclasses.dataclass(frozen=True)
class Classifier(Task):
    """A classifier of images, clean or noisy, trained by the cross-entropy of the labels.

    With a schedule it is of p(y | x_t), t uniform, and guides what diffusion models sample
    (Dhariwal & Nichol 2021, sec. 4); the metrics are then means over t.

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

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.network.classes

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

    def check(self) -> None:
        """Check that the data set has labels.

        Raises:
          UserError: it has none.
        """
        if not self.network.classes:
            raise UserError("a classifier needs a data set with labels")

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the first parameters."""
        return Variables(self.network.init(key, to_images(batch.images[:1], self.info.levels)), {})

    def noisy(
        self,
        x0: Float[Array, "batch h w c"],
        keys: Key[Array, "batch"],
        t: Float[Array, "batch"],
    ) -> Float[Array, "batch h w c"]:
        """Return x_t of images in [-1, 1], with the noise of the schedule."""
        assert self.schedule is not None
        return corrupt(x0, keys, self.schedule.make().logsnr(t)).xt

    def logits(
        self,
        params: PyTree,
        x: Float[Array, "batch h w c"],
        keys: Key[Array, "batch"] | None,
        t: Float[Array, "batch"] | None,
    ) -> Float[Array, "batch classes"]:
        """Return the logits of images in [-1, 1].

        Args:
          params: of the network.
          x: clean images, or x_t.
          keys: of dropout; None: there is none.
          t: times in [0, 1] of x_t; None: the images are clean.
        """
        outputs: PyTree = self.network.apply(params, x, keys, t)
        logits: Array = outputs[0]
        return logits

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the cross-entropy of every image, in nats; 0 without a class.

        Args:
          variables, batch, keys, train, all_gather: see `Task.loss`.
        """
        del all_gather
        shift_keys, dropout_keys, *noise_keys = split_keys(keys, 4 if self.schedule else 2)
        images, t = batch.images, None
        if train and self.shift:
            images = jax.vmap(lambda key, image: shift_image(key, image, self.shift))(
                shift_keys, images
            )
        x = to_images(images, self.info.levels)
        if self.schedule:
            t = jax.vmap(jax.random.uniform)(noise_keys[0])
            x = self.noisy(x, noise_keys[1], t)
        logits = self.logits(variables.params, x, dropout_keys if train else None, t)
        correct = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
        return LossOutput(cross_entropy(logits, batch.labels), {"accuracy": correct}, {})

    def evaluations(self) -> "tuple[Evaluate[Classifier], ...]":
        """Return the functions that evaluate the task."""
        levels = (evaluate_noise_levels,) if self.schedule else ()
        return evaluate_accuracy, hardest_images, *levels

    def log_likelihood(
        self, params: PyTree, xt: Array, logsnr: Float[Array, ""], labels: Int[Array, "batch"]
    ) -> Float[Array, "batch"]:
        """Return log p(label | x_t) of each image in nats; 0 for the label `classes`, no class.

        Args:
          params: of the network.
          xt: [B, H, W, C].
          logsnr: of all images.
          labels: of every image.
        """
        assert self.schedule is not None
        t = jnp.clip(self.schedule.make().time(logsnr), 0, 1)
        logits = self.logits(params, xt, None, jnp.full(len(xt), t))
        nll = cross_entropy(logits, jnp.minimum(labels, self.classes - 1))
        return jnp.where(labels < self.classes, -nll, 0.0)

    def guide(self, params: PyTree, scale: float | Array) -> ClassifierGuidance | None:
        """Return the guidance of diffusion models by a noisy classifier; None: it is not noisy."""
        return ClassifierGuidance(scale, params, self) if self.schedule else None


def shift_image(
    key: Key[Array, ""], image: UInt8[Array, "h w c"], most: int
) -> UInt8[Array, "h w c"]:
    """Return an image moved by up to `most` pixels either way, with its edges repeated."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
    row, column = jax.random.randint(key, (2,), 0, 2 * most + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), (height, width, channels))


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    """Return -log p(label) of each image; 0 without a class, which `labelled` leaves out before."""
    place = jnp.maximum(labels, 0)[:, None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), place, 1)[:, 0]
    return jnp.where(labels < 0, 0.0, nll)


def classify(
    task: Classifier, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the cross-entropy and whether the label is right of every image: [B, times].

    The times of a noisy classifier are one in each tenth of [0, 1]; else there is one.

    Args:
      task: the task.
      params: of the classifier.
      batch: images.
      keys: one for every image.
    """
    x0 = to_images(batch.images, task.info.levels)
    t_keys, eps_keys = split_keys(keys, 2)
    times = evaluation_times(batch.index, t_keys, NOISE_LEVELS) if task.schedule else None

    def classify_at(number: Array) -> tuple[Array, Array]:
        x, t = x0, None
        if times is not None:
            t = times[:, number]
            noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(eps_keys)
            x = task.noisy(x0, noise_keys, t)
        logits = task.logits(params, x, None, t)
        return cross_entropy(logits, batch.labels), logits.argmax(-1) == batch.labels

    nll, correct = jax.lax.map(classify_at, jnp.arange(NOISE_LEVELS if task.schedule else 1))
    return {"nll": nll.T, "correct": correct.T}


def classified(context: Context) -> dict[str, np.ndarray]:
    """Return what `classify` returns of the split that is evaluated."""
    task = context.task
    assert isinstance(task, Classifier)
    params = context.variables.params
    return context.per_example(classify, context.held_out, task.eval_batch_size, params)


def evaluate_accuracy(task: Classifier, context: Context) -> Evaluation:
    """Return the loss and the accuracy."""
    del task
    values = context.shared(classified)
    return Evaluation(averages({"loss": values["nll"], "accuracy": values["correct"]}))


def hardest_images(task: Classifier, context: Context) -> Evaluation:
    """Return a sheet of the images with the largest losses, in the order of the split."""
    worst = np.argsort(-context.shared(classified)["nll"].mean(1))[:40]
    images = to_images(context.held_out.rows(np.sort(worst)).images, task.info.levels)
    return Evaluation(images={"hardest": plots.grid(images, columns=10)})


def evaluate_noise_levels(task: Classifier, context: Context) -> Evaluation:
    """Return the accuracy of a noisy classifier in each tenth of the times."""
    del task
    correct = context.shared(classified)["correct"]
    t = np.arange(NOISE_LEVELS) / NOISE_LEVELS
    names = [f"accuracy_t_{level:.1f}" for level in t]
    image = plots.lines(t, {"accuracy": correct.mean(0)}, "t", "By noise level")
    return Evaluation(averages(dict(zip(names, correct.T, strict=True))), {"levels": image})


def labelled(data: Data) -> Data:
    """Leave out the images without a class, from which a classifier learns nothing, and log it.

    Raises:
      UserError: no image of a split has a class.
    """
    parts: dict[str, Split] = {}
    skipped = []
    for name, split in (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    ):
        if split is None:
            continue
        labels = np.asarray(split.labels)
        kept = np.flatnonzero(labels >= 0)
        if not len(kept):
            raise UserError(
                f"none of the {len(labels)} {name} images of {data.title} has a class; a "
                "classifier needs some, in sub-folders that are named after their classes"
            )
        if len(kept) < len(labels):
            skipped.append(f"{len(labels) - len(kept)} {name}")
            parts[name] = split.subset(kept)
    if skipped:
        log(f"{data.title}: skipped {' and '.join(skipped)} images that have no class")
    return data._replace(
        train=parts.get("train", data.train),
        validation=parts.get("validation", data.validation),
        test=parts.get("test", data.test),
    )
