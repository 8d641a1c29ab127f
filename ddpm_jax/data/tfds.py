"""Image data sets of TFDS (TensorFlow Datasets), read by name without TensorFlow.

`tfds.data_source` reads prepared data sets without TensorFlow, and the builders in
`tfds_builders.py` prepare MNIST, Fashion-MNIST and CIFAR-10 without TensorFlow.  Only feature
classes of TFDS itself are imported, because the files of a data set may be untrusted.  Decoded
images are cached as memory-mapped arrays, because `tfds.data_source` needs almost a millisecond for
each image.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ddpm_jax.data.cache import fingerprint, load_decoded
from ddpm_jax.data.captions import usable_captions
from ddpm_jax.data.images import DARK_NOTE, decode, decoding, reason_of
from ddpm_jax.data.split_names import split_folders
from ddpm_jax.data.tfds_builders import (
    NAME,
    PREPARED_HERE,
    Builder,
    Connector,
    base_name,
    first_line,
    known_names,
    library,
    prepare,
)
from ddpm_jax.data.types import Data, Split
from ddpm_jax.errors import UserError, printable, suggestion
from ddpm_jax.system.terminal import print_error

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
CAPTIONS = ("caption", "captions", "text", "description")  # feature names, the preferred one first
VERSION = 5  # of the cached data; increase it when the same records are decoded differently
CHUNK = 1000  # records read at a time
MANY = 5000  # a message is printed before more records than this are decoded
Label: TypeAlias = int | str | None
Source: TypeAlias = Any  # TFDS's random access to the records of a split
Record: TypeAlias = Any  # the protobuf features of a record by name


def load(name: str, data_dir: str | None, may_prepare: bool = True) -> Data:
    """Read a TFDS data set; download and prepare it if needed.

    Args:
      name: The name of the data set, `NAME[/CONFIG][:VERSION]`.
      data_dir: The directory of prepared data sets. If None, TFDS's default directory is used.
      may_prepare: If True, a data set that is not in `data_dir` is downloaded and prepared. If
        False, UserError is raised.

    Raises:
      MissingData: If the data set is not prepared and its host does not answer within 3 seconds.
      UserError: If TFDS has no data set of this name, the images of the data set do not have one
        size, the preparation needs TensorFlow, or a feature class is not part of TFDS.
    """
    tfds = library()
    root = pathlib.Path(os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)).absolute()
    try:
        if not NAME.fullmatch(name):
            raise tfds.core.DatasetNotFoundError(name)
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        hint = suggestion(base_name(name), [*known_names(), "digits"])
        raise UserError(f'there is no data set "{printable(name)}"{hint}') from None
    except Exception as error:  # TFDS may raise any exception for an invalid name or damaged files
        raise UserError(f"data set {name} cannot be opened: {first_line(error)}") from None
    folder = pathlib.Path(str(builder.data_path))
    if not (folder / "dataset_info.json").exists():
        if not may_prepare:
            raise UserError(
                f"there is no data set {name} in {root}; give --data_dir=DIR, the directory that "
                "contains it"
            )
        builder = prepare(
            builder.name if name in PREPARED_HERE else name, builder, root, print_error
        )
        folder = pathlib.Path(str(builder.data_path))
    stamp = hashlib.sha256(f"{VERSION} {name}".encode())
    for path in sorted(folder.glob("*")):
        if path.is_file():
            stat = path.stat()
            line = f" {stat.st_size} {stat.st_mtime_ns}\n"
            stamp.update(os.fsencode(path.name) + line.encode())
    return load_decoded(folder, stamp.hexdigest(), lambda: _decode(name, builder))


class _Features(NamedTuple):
    """The TFDS features of a data set that are read, in addition to the feature `image`.

    Attributes:
      label: The name of the label feature; None if there are no labels.
      classes: The names of the classes; None if the data set does not name its classes.
      caption: The name of the caption feature; None if there are no captions.
      notes: Notes for the user.
    """

    label: str | None
    classes: tuple[str, ...] | None
    caption: str | None
    notes: tuple[str, ...] = ()


class _Examples(NamedTuple):
    """The N decoded examples of a split, with notes for the user.

    `images` are uint8 [N, H, W, C]. A label is a number, a text, or None if it is missing.
    `captions` is empty if the data set has no captions.
    """

    images: np.ndarray
    labels: list[Label]
    captions: list[str]
    notes: tuple[str, ...]

    def rows(self, rows: np.ndarray) -> "_Examples":
        """Return the examples at positions `rows`, int [N]; the result has no notes."""
        captions = [self.captions[row] for row in rows] if self.captions else []
        return _Examples(self.images[rows], [self.labels[row] for row in rows], captions, ())


def _decode(name: str, builder: Builder) -> Data:
    splits = split_folders(builder.info.splits)
    if "train" not in splits:
        raise UserError(
            f"data set {name} has no train split, only {', '.join(builder.info.splits)}; give a "
            "data set with training images"
        )
    features = _features(name, builder.info.features)
    if builder.info.splits.total_num_examples > MANY:
        print_error(f"decoding the images of {name}; later runs read them from the cache")
    names = {split: folders[0] for split, folders in splits.items()}
    if "test" not in names and "validation" in names:  # the final metrics need a test split
        names["test"] = names.pop("validation")
    order = [split for split in ("train", "test", "validation") if split in names]
    examples = {split: _read(name, builder, names[split], features) for split in order}
    notes = features.notes + tuple(note for part in examples.values() for note in part.notes)
    if "test" not in examples:
        held_out = np.arange(len(examples["train"].images)) % 10 == 9
        train, test = (examples["train"].rows(np.flatnonzero(r)) for r in (~held_out, held_out))
        examples = {"train": train, "test": test}
        notes += ("it has no test split; every tenth training example is used as the test split",)
    unused = sorted(set(builder.info.splits) - set(names.values()))
    if unused:
        notes += (f"its splits {', '.join(unused)} are not used",)
    labels, classes = _labels(name, features, {s: part.labels for s, part in examples.items()})
    parts = {s: Split(part.images, labels[s]) for s, part in examples.items()}
    if features.caption:
        tokens, token_notes = usable_captions({s: part.captions for s, part in examples.items()})
        parts = {s: part._replace(captions=tokens[s]) for s, part in parts.items()}
        notes += token_notes
    return Data(
        name=name,
        title=TITLES.get(builder.name, builder.name),
        train=parts["train"],
        test=parts["test"],
        validation=parts.get("validation"),
        levels=256,
        classes=classes,
        fingerprint=fingerprint(*parts.values()),
        notes=tuple(printable(note) for note in notes),
    )


def _features(name: str, features: Connector) -> _Features:
    """Select the features to read from all TFDS features of data set `name`."""
    types = library().features
    features = dict(features) if isinstance(features, types.FeaturesDict) else {}
    image = features.get("image")
    if not isinstance(image, types.Image):
        raise UserError(
            f"data set {name} has no images in a feature called image; its features are "
            f"{', '.join(features)}; give another data set"
        )
    if np.dtype(image.np_dtype).kind != "u":
        raise UserError(
            f"data set {name} contains {image.np_dtype} images, whose range is unknown; write them "
            "to a folder of 8-bit images and use folder:PATH"
        )
    caption = next(
        (word for word in CAPTIONS if word in features and _is_text(features[word])), None
    )
    label = features.get("label")
    if label is None:
        return _Features(None, None, caption)
    if isinstance(label, types.ClassLabel) and label.num_classes is not None:
        return _Features("label", tuple(label.names), caption)
    if getattr(label, "shape", None) == () and (
        _is_text(label) or np.dtype(label.np_dtype).kind in "iub"
    ):
        return _Features("label", None, caption)
    return _Features(None, None, caption, ("its labels are not classes and are not used",))


def _labels(
    name: str, features: _Features, labels_of: dict[str, list[Label]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the labels of each split as indices of classes, and the names of the classes.

    The labels are int32 [N], with -1 for a missing label. If the data set does not name its
    classes, the classes are the distinct labels, sorted.
    """
    present = {label for labels in labels_of.values() for label in labels} - {None, -1, ""}
    class_index: dict[Label, int]
    if features.classes is None:
        # Labels of one data set are all numbers or all texts.
        ordered: list[Label] = sorted(present)  # type: ignore[type-var]
        class_index = {label: index for index, label in enumerate(ordered)}
        classes = tuple(str(label) for label in class_index)
    else:
        classes = features.classes
        class_index = {index: index for index in range(len(classes))}
        if invalid := present - class_index.keys():
            least = min(invalid)  # type: ignore[type-var]
            raise UserError(
                f"data set {name} has a label {least}, but labels must be from 0 to "
                f"{len(classes) - 1}; prepare it again with valid labels"
            )
    return {
        split: np.array([class_index.get(label, -1) for label in labels], np.int32)
        for split, labels in labels_of.items()
    }, classes


def _read(name: str, builder: Builder, split: str, features: _Features) -> _Examples:
    """Return every example of a split that can be decoded.

    The records are read in chunks, and only the selected features are decoded. This takes a fifth
    of the time that `tfds.data_source` takes to read the examples one by one.
    """
    images: np.ndarray | None = None
    examples = _Examples(np.empty(0), [], [], ())
    corrupt: list[str] = []
    animated = dark = 0
    with decoding(), _readable(name, builder):
        source = builder.as_data_source(split).data_source
        for number, record in enumerate(_records(source)):
            encoded = record["image"].bytes_list.value
            try:
                image, is_animated, is_dark = decode(encoded[0] if encoded else b"")
            except Exception as error:  # the decoders of Pillow may raise any exception
                corrupt.append(f"number {number} ({reason_of(error)})")
                continue
            row = len(examples.labels)
            images = _with_image(name, images, row, image, len(source))
            animated += is_animated
            dark += is_dark
            examples.labels.append(_label(record, features.label))
            if features.caption:  # use the first of several captions
                words = record[features.caption].bytes_list.value
                examples.captions.append(words[0].decode(errors="replace").strip() if words else "")
    if images is None:
        reason = f" ({corrupt[0]})" if corrupt else ""
        raise UserError(
            f"split {split} of data set {name} has no image that can be read{reason}; prepare it "
            "again, or give another data set"
        )
    notes: tuple[str, ...] = ()
    if corrupt:
        listed = ", ".join(corrupt[:5]) + (", ..." if len(corrupt) > 5 else "")
        notes += (f"skipped {len(corrupt)} corrupt of {len(source)} {split} images: {listed}",)
    if animated:
        notes += (f"{animated} {split} images have several frames; only the first frame is used",)
    if dark:
        notes += (f"{dark} {split} {DARK_NOTE}",)
    return examples._replace(images=images[: len(examples.labels)], notes=notes)


@contextlib.contextmanager
def _readable(name: str, builder: Builder) -> Iterator[None]:
    """Replace any exception that TFDS raises while it reads files by a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data set {name} in {builder.data_path} cannot be read ({first_line(error)}); "
            "prepare it again in another directory, and give that directory as --data_dir=DIR"
        ) from error


def _records(source: Source) -> Iterator[Record]:
    """Yield a mapping from feature names to encoded features for each record."""
    from tensorflow_datasets.proto import tf_example_pb2

    for start in range(0, len(source), CHUNK):
        for record in source.__getitems__(range(start, min(start + CHUNK, len(source)))):
            yield tf_example_pb2.Example.FromString(record).features.feature


def _with_image(
    name: str, images: np.ndarray | None, row: int, image: np.ndarray, count: int
) -> np.ndarray:
    """Return `images`, uint8 [count, H, W, C], with `image`, uint8 [H, W, C], in row `row`.

    If `images` is None, the array is created. If some images are grey and others are RGB, all
    images become RGB.
    """
    if images is None:
        images = np.empty((count, *image.shape), np.uint8)
    if image.shape[:2] != images.shape[1:3]:
        sizes = " and ".join(f"{w}x{h}" for h, w in (images.shape[1:3], image.shape[:2]))
        raise UserError(
            f"data set {name} contains images of different sizes ({sizes}); resize them to one "
            "size, write them to a folder and use folder:PATH"
        )
    if image.shape[2] > images.shape[3]:
        images = np.repeat(images, image.shape[2], 3)
    images[row] = image
    return images


def _label(record: Record, name: str | None) -> Label:
    """Return the label of a record, which is its feature `name`; None if `name` is None."""
    if name is None:
        return None
    words, numbers = record[name].bytes_list.value, record[name].int64_list.value
    if words:
        return str(words[0].decode(errors="replace").strip())
    return int(numbers[0]) if numbers else None


def _is_text(feature: Connector) -> bool:
    """Return whether a feature is a text or a list of texts."""
    dtype = getattr(feature, "np_dtype", None)
    return isinstance(dtype, (np.dtype, type)) and np.dtype(dtype) == object
