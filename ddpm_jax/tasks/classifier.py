"""The task of a classifier of clean or noisy images."""

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

NOISE_LEVELS = 10  # times at which a noisy classifier is evaluated per image


@dataclasses.dataclass(frozen=True)
class Classifier(Task):
    """A classifier of clean or noisy images, trained by the cross-entropy of the labels.

    With a schedule it is a classifier p(y | x_t) of noisy images, with t uniform in [0, 1], which
    can guide diffusion models (Dhariwal & Nichol 2021, sec. 4). Its metrics are means over t.

    Attributes:
      network: The network of the classifier; its last hidden layer gives the features of images.
      shift: Maximum number of pixels, from 0 to 1000, by which training images are shifted at
        random along each axis; 0 turns this augmentation off.
      schedule: Noise schedule of the images of a classifier that guides diffusion models; with
        "none", the images are clean.
      eval_batch_size: Number of images in one batch of an evaluation.
      info: The description of the data set.
    """

    network: ClassifierNetwork = ClassifierNetwork()
    shift: Annotated[int, AtLeast(0), AtMost(1000)] = 0
    schedule: Cosine | None = None
    eval_batch_size: EvalBatch = 500
    info: Annotated[DataInfo, BOUND] = UNBOUND

    run_type: ClassVar[str] = "classifier"

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.network.classes

    def prepare_data(self, data: Data) -> Data:
        """Return the data without the images that have no class."""
        return without_unlabelled(data)

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
        """Check that the data set has class labels.

        Raises:
          UserError: If the data set has no class labels.
        """
        if not self.network.classes:
            raise UserError(
                f"a classifier needs a data set with labels, and {self.info.name} has no classes; "
                "give --config.data=digits, or folder:PATH with one sub-folder for each class"
            )

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the initial parameters."""
        return Variables(self.network.init(key, to_images(batch.images[:1], self.info.levels)), {})

    def noisy(
        self,
        x0: Float[Array, "batch h w c"],
        keys: Key[Array, "batch"],
        t: Float[Array, "batch"],
    ) -> Float[Array, "batch h w c"]:
        """Return the noisy images x_t of images in [-1, 1], at times t of the schedule."""
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
          params: The parameters of the network.
          x: Clean images x0 or noisy images x_t [B, H, W, C].
          keys: Random keys of dropout, one for each example; if None, dropout is off.
          t: The times of x_t [B] in [0, 1]; if None, the images are clean.
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
        """Return the cross-entropy of every image in nats, which is 0 for an unlabelled image.

        Args:
          variables: The parameters and the extra variables.
          batch: Images, labels and indices of B examples.
          keys: One key for each example, [B].
          train: If True, dropout and the other randomness of training are on.
          all_gather: The function that gathers the arrays of all devices.
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
        """Return log p(label | x_t) of each image in nats.

        Args:
          params: The parameters of the network.
          xt: Noisy images [B, H, W, C].
          logsnr: The log signal-to-noise ratio, the same for all images.
          labels: The classes [B]; for the label `classes`, which means "no class", 0 is returned.
        """
        assert self.schedule is not None
        t = jnp.clip(self.schedule.make().time(logsnr), 0, 1)
        logits = self.logits(params, xt, None, jnp.full(len(xt), t))
        nll = cross_entropy(logits, jnp.minimum(labels, self.classes - 1))
        return jnp.where(labels < self.classes, -nll, 0.0)

    def guidance_method(self, params: PyTree, scale: float | Array) -> ClassifierGuidance | None:
        """Return classifier guidance of scale `scale`, or None if the classifier is not noisy."""
        return ClassifierGuidance(scale, params, self) if self.schedule else None


def shift_image(
    key: Key[Array, ""], image: UInt8[Array, "h w c"], limit: int
) -> UInt8[Array, "h w c"]:
    """Return an image shifted by up to `limit` pixels along each axis, with repeated edges."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((limit, limit), (limit, limit), (0, 0)), mode="edge")
    row, column = jax.random.randint(key, (2,), 0, 2 * limit + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), (height, width, channels))


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    """Return -log p(label) of each image in nats, and 0 for the label -1, which means no class."""
    indices = jnp.maximum(labels, 0)[:, None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), indices, 1)[:, 0]
    return jnp.where(labels < 0, 0.0, nll)


def classify(
    task: Classifier, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the cross-entropy "nll" in nats and the indicator "correct" of each image [B, times].

    A noisy classifier is evaluated at 10 times per image, one in each tenth of [0, 1]; a classifier
    of clean images is evaluated once.

    Args:
      task: The bound task.
      params: The parameters of the classifier.
      batch: A batch of images.
      keys: Random keys, one for each image.
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


def shared_predictions(context: Context) -> dict[str, np.ndarray]:
    """Return the outputs of `classify` for the split that is evaluated."""
    task = context.task
    assert isinstance(task, Classifier)
    params = context.variables.params
    return context.per_example(classify, context.held_out, task.eval_batch_size, params)


def evaluate_accuracy(task: Classifier, context: Context) -> Evaluation:
    """Return the loss and the accuracy."""
    del task
    values = context.cached(shared_predictions)
    return Evaluation(averages({"loss": values["nll"], "accuracy": values["correct"]}))


def hardest_images(task: Classifier, context: Context) -> Evaluation:
    """Return a sheet of the 40 images with the largest losses, in the order of the split."""
    worst = np.argsort(-context.cached(shared_predictions)["nll"].mean(1))[:40]
    images = to_images(context.held_out.rows(np.sort(worst)).images, task.info.levels)
    return Evaluation(images={"hardest": plots.grid(images, columns=10)})


def evaluate_noise_levels(task: Classifier, context: Context) -> Evaluation:
    """Return the accuracy of a noisy classifier for the times in each tenth of [0, 1]."""
    del task
    correct = context.cached(shared_predictions)["correct"]
    t = np.arange(NOISE_LEVELS) / NOISE_LEVELS
    names = [f"accuracy_t_{level:.1f}" for level in t]
    image = plots.lines(t, {"accuracy": correct.mean(0)}, "t", "Accuracy by noise level")
    return Evaluation(averages(dict(zip(names, correct.T, strict=True))), {"levels": image})


def without_unlabelled(data: Data) -> Data:
    """Return the data without the unlabelled images (label -1), and log how many there are.

    Raises:
      UserError: If no image of a split has a class.
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
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise UserError(
                f"none of the {len(labels)} {name} images of {data.title} has a class; a "
                "classifier needs labelled images: put them into one sub-folder for each class"
            )
        if len(rows) < len(labels):
            skipped.append(f"{len(labels) - len(rows)} {name}")
            parts[name] = split.subset(rows)
    if skipped:
        log(f"{data.title}: skipped {' and '.join(skipped)} images that have no class")
    return data._replace(
        train=parts.get("train", data.train),
        validation=parts.get("validation", data.validation),
        test=parts.get("test", data.test),
    )
