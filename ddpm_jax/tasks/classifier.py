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

NOISE_LEVELS = 10  # number of times t per image in the evaluation of a noisy classifier


@dataclasses.dataclass(frozen=True)
class Classifier(Task):
    """A classifier of clean or noisy images, trained by the cross-entropy of the labels.

    If it has a noise schedule, it is a classifier p(y | x_t) of noisy images with t uniform in
    [0, 1], for classifier guidance (Dhariwal & Nichol 2021, sec. 4). Its metrics are means over t.

    Attributes:
      network: The network of the classifier; metrics of samples use its last hidden layer.
      shift: Training images are shifted at random by up to this many pixels along each axis; 0
        turns this off.
      schedule: Noise schedule of x_t for a classifier of noisy images, which classifier guidance
        needs; with "none", the classifier is trained on clean images.
      eval_batch_size: Number of images in one batch of an evaluation; it does not change results.
      info: Description of the data set: image shape, number of classes and caption length.
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
        """Return the data without the images that have no class label."""
        return without_unlabelled(data)

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Classifier":
        """Return the task with its network set up for the classes and the precision."""
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
        """Return the initial parameters of the network; there are no extra variables."""
        return Variables(self.network.init(key, to_images(batch.images[:1], self.info.levels)), {})

    def noisy(
        self,
        x0: Float[Array, "batch h w c"],
        keys: Key[Array, "batch"],
        t: Float[Array, "batch"],
    ) -> Float[Array, "batch h w c"]:
        """Add noise to images x0 in [-1, 1], and return x_t at the times t in [0, 1]."""
        assert self.schedule is not None
        return corrupt(x0, keys, self.schedule.make().logsnr(t)).xt

    def logits(
        self,
        params: PyTree,
        x: Float[Array, "batch h w c"],
        keys: Key[Array, "batch"] | None,
        t: Float[Array, "batch"] | None,
    ) -> Float[Array, "batch classes"]:
        """Return the logits [B, classes] of images.

        Args:
          params: The parameters of the network.
          x: Clean images x0 in [-1, 1], or noisy images x_t, [B, H, W, C].
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
        """Return the cross-entropy of every image in nats; it is 0 for an image without a label.

        Args:
          variables: The parameters of the network.
          batch: Images, labels and indices of B examples.
          keys: Random keys, one for each example, [B].
          train: If True, dropout and random shifts are on.
          all_gather: Not used.
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
        """Return the functions that compute the metrics and images of an evaluation."""
        levels = (evaluate_noise_levels,) if self.schedule else ()
        return evaluate_accuracy, hardest_images, *levels

    def log_likelihood(
        self, params: PyTree, xt: Array, logsnr: Float[Array, ""], labels: Int[Array, "batch"]
    ) -> Float[Array, "batch"]:
        """Return log p(label | x_t) of each image in nats, [B], for classifier guidance.

        Args:
          params: The parameters of the network.
          xt: Noisy images [B, H, W, C].
          logsnr: The log signal-to-noise ratio, the same for all images.
          labels: The labels [B] in 0 ... classes. The label `classes` means "no class"; its result
            is 0.
        """
        assert self.schedule is not None
        t = jnp.clip(self.schedule.make().time(logsnr), 0, 1)
        logits = self.logits(params, xt, None, jnp.full(len(xt), t))
        nll = cross_entropy(logits, jnp.minimum(labels, self.classes - 1))
        return jnp.where(labels < self.classes, -nll, 0.0)

    def guidance_method(self, params: PyTree, scale: float | Array) -> ClassifierGuidance | None:
        """Return classifier guidance; return None if the classifier is trained on clean images."""
        return ClassifierGuidance(scale, params, self) if self.schedule else None


def shift_image(
    key: Key[Array, ""], image: UInt8[Array, "h w c"], limit: int
) -> UInt8[Array, "h w c"]:
    """Shift an image by up to `limit` random pixels along each axis; edge pixels are repeated."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((limit, limit), (limit, limit), (0, 0)), mode="edge")
    row, column = jax.random.randint(key, (2,), 0, 2 * limit + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), (height, width, channels))


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    """Return -log p(label) of each image in nats; it is 0 for the label -1 (no class)."""
    indices = jnp.maximum(labels, 0)[:, None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), indices, 1)[:, 0]
    return jnp.where(labels < 0, 0.0, nll)


def classify(
    task: Classifier, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return {"nll": cross-entropy in nats, "correct": True if classified correctly}, [B, times].

    A noisy classifier is evaluated at 10 times per image, one in each tenth of [0, 1]; a classifier
    of clean images is evaluated once.

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
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
    """Return the cross-entropy and correctness (see `classify`) for the evaluated split."""
    task = context.task
    assert isinstance(task, Classifier)
    params = context.variables.params
    return context.per_example(classify, context.held_out, task.eval_batch_size, params)


def evaluate_accuracy(task: Classifier, context: Context) -> Evaluation:
    """Return the mean cross-entropy in nats ("loss") and the accuracy, from 0 to 1."""
    del task
    values = context.cached(shared_predictions)
    return Evaluation(averages({"loss": values["nll"], "accuracy": values["correct"]}))


def hardest_images(task: Classifier, context: Context) -> Evaluation:
    """Return a grid of the 40 images with the largest losses, in the order of the split."""
    worst = np.argsort(-context.cached(shared_predictions)["nll"].mean(1))[:40]
    images = to_images(context.held_out.rows(np.sort(worst)).images, task.info.levels)
    return Evaluation(images={"hardest": plots.grid(images, columns=10)})


def evaluate_noise_levels(task: Classifier, context: Context) -> Evaluation:
    """Return the accuracy of a noisy classifier in each tenth of the times t in [0, 1]."""
    del task
    correct = context.cached(shared_predictions)["correct"]
    t = np.arange(NOISE_LEVELS) / NOISE_LEVELS
    names = [f"accuracy_t_{level:.1f}" for level in t]
    image = plots.lines(t, {"accuracy": correct.mean(0)}, "t", "Accuracy by noise level")
    return Evaluation(averages(dict(zip(names, correct.T, strict=True))), {"levels": image})


def without_unlabelled(data: Data) -> Data:
    """Remove the images without a class (label -1), and log their number.

    Raises:
      UserError: If a split has no image with a class.
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
