"""Any image data set of TFDS by name, read without TensorFlow.

`tfds.data_source` needs no TensorFlow, and the builders of `tfds_builders` prepare the usual three
without it; no class but TFDS's own is imported of a stranger's data set.  What was read once is
kept in the user's cache as a memory-mapped array: image by image through `tfds.data_source` takes
most of a millisecond each.
"""

import contextlib
import hashlib
import os
import pathlib
import urllib.error
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ddpm_jax.data.cache import decoded_once, fingerprint
from ddpm_jax.data.captions import usable_captions
from ddpm_jax.data.images import DARK_NOTE, decode, decoding, reason_of
from ddpm_jax.data.split_names import split_folders
from ddpm_jax.data.tfds_builders import (
    NAME,
    PREPARED_HERE,
    Builder,
    Connector,
    address,
    base_name,
    first_line,
    have_tensorflow,
    known_names,
    library,
    make_folder,
    reachable,
    without_tensorflow,
)
from ddpm_jax.data.types import Data, Split
from ddpm_jax.errors import MissingData, UserError, nearest, printable
from ddpm_jax.system.terminal import print_error

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
CAPTIONS = ("caption", "captions", "text", "description")  # names of a feature, the first of them
VERSION = 5  # of what is kept: another where the same records are read in another way
CHUNK = 1000  # records read at a time
MANY = 5000  # records, from which on it takes seconds to decode them
Label: TypeAlias = int | str | None
Source: TypeAlias = Any  # TFDS's random access to the records of a split
Record: TypeAlias = Any  # the features of a record by name, as protobuf holds them


def load(name: str, data_dir: str | None, may_prepare: bool = True) -> Data:
    """Read TFDS data set `name` (`NAME[/CONFIG][:VERSION]`), preparing it where needed.

    Args:
      data_dir: where it lies or is prepared; None: in TFDS's own folder.
      may_prepare: whether it may be prepared there.

    Raises:
      MissingData: it is not prepared and its host does not answer within 3 seconds.
      UserError: TFDS knows no such data set, it holds no images of one size, it needs
        TensorFlow to be prepared, or it has feature classes that are not TFDS's.
    """
    tfds = library()
    root = pathlib.Path(os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)).absolute()
    try:
        if not NAME.fullmatch(name):
            raise tfds.core.DatasetNotFoundError(name)
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        hint = nearest(base_name(name), [*known_names(), "digits"])
        raise UserError(f'there is no data set "{printable(name)}"{hint}') from None
    except Exception as error:  # whatever TFDS raises of a name or of damaged files
        raise UserError(f"data set {name}: {first_line(error)}") from None
    folder = pathlib.Path(str(builder.data_path))
    if not (folder / "dataset_info.json").exists():
        if not may_prepare:
            raise UserError(f"there is no data set {name} in {root}; give --data_dir=DIR of one")
        builder = prepare(builder.name if name in PREPARED_HERE else name, builder, root)
        folder = pathlib.Path(str(builder.data_path))
    stamp = hashlib.sha256(f"{VERSION} {name}".encode())
    for path in sorted(folder.glob("*")):
        if path.is_file():
            stat = path.stat()
            line = f" {stat.st_size} {stat.st_mtime_ns}\n"
            stamp.update(os.fsencode(path.name) + line.encode())
    return decoded_once(folder, stamp.hexdigest(), lambda: _decode(name, builder))


def prepare(
    name: str, builder: Builder, root: pathlib.Path, manual_dir: str | None = None
) -> Builder:
    """Download and prepare a data set below `root`; returns a builder that can read it.

    Args:
      name: MNIST, Fashion-MNIST and CIFAR-10 need no TensorFlow; others may.
      builder: TFDS's own builder of it.
      root: the folder of TFDS data sets.
      manual_dir: a folder of files that were downloaded already; checksums are compared.

    Raises:
      MissingData: it cannot be downloaded.
      UserError: it needs TensorFlow, or its files cannot be read or written.
    """
    tfds = library()
    here = name in PREPARED_HERE
    if here:
        with tfds.core.registered.skip_registration():
            builder = without_tensorflow(name)(data_dir=root)
    elif not have_tensorflow():
        raise UserError(
            f"data set {name} is not prepared in {root}, and TFDS needs TensorFlow to prepare "
            "it: pip install tensorflow, or prepare it elsewhere and give --data_dir"
        )
    if manual_dir is None and not reachable(address(builder)):
        raise MissingData(
            f"data set {name} is not prepared in {root}, and its host does not answer; "
            "give --data_dir=DIR where it is prepared, or try again with a network"
        )
    print_error(f"preparing {name} in {root}")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        make_folder(root)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except UserError:
        raise
    except Exception as error:
        import requests

        network = isinstance(error, (requests.RequestException, urllib.error.URLError))
        kind = MissingData if network or "DownloadError" in type(error).__name__ else UserError
        raise kind(f"data set {name} could not be prepared: {first_line(error)}") from error
    return tfds.builder(name, data_dir=root)


class _Features(NamedTuple):
    """Which features are read: a label (and its classes, if they are named) and a caption."""

    label: str | None
    classes: tuple[str, ...] | None
    caption: str | None
    notes: tuple[str, ...] = ()


class _Examples(NamedTuple):
    """A split as it is read: labels are numbers or texts, None where there is none."""

    images: np.ndarray
    labels: list[Label]
    captions: list[str]
    notes: tuple[str, ...]

    def rows(self, rows: np.ndarray) -> "_Examples":
        """Return the examples at some rows, without the notes of the whole."""
        captions = [self.captions[row] for row in rows] if self.captions else []
        return _Examples(self.images[rows], [self.labels[row] for row in rows], captions, ())


def _decode(name: str, builder: Builder) -> Data:
    splits = split_folders(builder.info.splits)
    if "train" not in splits:
        raise UserError(
            f"data set {name} has no train split, only {', '.join(builder.info.splits)}"
        )
    features = _features(name, builder.info.features)
    if builder.info.splits.total_num_examples > MANY:
        print_error(f"decoding {name}, once")
    names = {split: folders[0] for split, folders in splits.items()}
    if "test" not in names and "validation" in names:  # the only held-out images are for the end
        names["test"] = names.pop("validation")
    order = [split for split in ("train", "test", "validation") if split in names]
    read = {split: _read(name, builder, names[split], features) for split in order}
    notes = features.notes + tuple(note for part in read.values() for note in part.notes)
    if "test" not in read:  # every tenth example is held out
        held_out = np.arange(len(read["train"].images)) % 10 == 9
        train, test = (read["train"].rows(np.flatnonzero(r)) for r in (~held_out, held_out))
        read = {"train": train, "test": test}
        notes += ("it has no test split: every tenth training example is held out instead",)
    left = sorted(set(builder.info.splits) - set(names.values()))
    if left:
        notes += (f"its splits {', '.join(left)} are not used",)
    labels, classes = _labels(name, features, {s: part.labels for s, part in read.items()})
    parts = {s: Split(part.images, labels[s]) for s, part in read.items()}
    if features.caption:
        tokens, odd = usable_captions({s: part.captions for s, part in read.items()})
        parts = {s: part._replace(captions=tokens[s]) for s, part in parts.items()}
        notes += odd
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
    """Return which features of a data set are read."""
    kinds = library().features
    features = dict(features) if isinstance(features, kinds.FeaturesDict) else {}
    image = features.get("image")
    if not isinstance(image, kinds.Image):
        raise UserError(f"data set {name} holds no images: its features are {', '.join(features)}")
    if np.dtype(image.np_dtype).kind != "u":
        raise UserError(
            f"data set {name} holds {image.np_dtype} images, whose range is not known; write them "
            "to a folder of 8-bit images and use folder:PATH"
        )
    caption = next(
        (word for word in CAPTIONS if word in features and _is_text(features[word])), None
    )
    label = features.get("label")
    if label is None:
        return _Features(None, None, caption)
    if isinstance(label, kinds.ClassLabel) and label.num_classes is not None:
        return _Features("label", tuple(label.names), caption)
    if getattr(label, "shape", None) == () and (
        _is_text(label) or np.dtype(label.np_dtype).kind in "iub"
    ):
        return _Features("label", None, caption)
    return _Features(None, None, caption, ("its labels are not classes and are not used",))


def _labels(
    name: str, features: _Features, labels_of: dict[str, list[Label]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return numbers of classes [N] by split, -1 where there is none, and the classes.

    Where the data set names no classes, they are the different labels, sorted.
    """
    present = {label for labels in labels_of.values() for label in labels} - {None, -1, ""}
    numbers: dict[Label, int]
    if features.classes is None:
        # Labels of one data set are all numbers or all texts.
        ordered: list[Label] = sorted(present)  # type: ignore[type-var]
        numbers = {label: number for number, label in enumerate(ordered)}
        classes = tuple(str(label) for label in numbers)
    else:
        classes = features.classes
        numbers = {number: number for number in range(len(classes))}
        if odd := present - numbers.keys():
            least = min(odd)  # type: ignore[type-var]
            raise UserError(f"data set {name} has a label {least}, and {len(classes)} classes")
    return {
        split: np.array([numbers.get(label, -1) for label in labels], np.int32)
        for split, labels in labels_of.items()
    }, classes


def _read(name: str, builder: Builder, split: str, features: _Features) -> _Examples:
    """Return every example of a split that can be decoded.

    The records come in bulk from TFDS's data source, and only the features that are
    wanted are parsed and decoded: a fifth of the time of example after example.
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
                image, moves, dim = decode(encoded[0] if encoded else b"")
            except Exception as error:  # Pillow raises whatever its decoders raise
                corrupt.append(f"number {number} ({reason_of(error)})")
                continue
            row = len(examples.labels)
            images = _placed(name, images, row, image, len(source))
            animated += moves
            dark += dim
            examples.labels.append(_label(record, features.label))
            if features.caption:  # the first of several
                words = record[features.caption].bytes_list.value
                examples.captions.append(words[0].decode(errors="replace").strip() if words else "")
    if images is None:
        why = f": {corrupt[0]}" if corrupt else ""
        raise UserError(f"split {split} of data set {name} has no image that can be read{why}")
    notes: tuple[str, ...] = ()
    if corrupt:
        shown = ", ".join(corrupt[:5]) + (", ..." if len(corrupt) > 5 else "")
        notes += (f"skipped {len(corrupt)} corrupt of {len(source)} {split} images: {shown}",)
    if animated:
        notes += (f"{animated} {split} images have several frames: the first is used",)
    if dark:
        notes += (f"{dark} {split} {DARK_NOTE}",)
    return examples._replace(images=images[: len(examples.labels)], notes=notes)


@contextlib.contextmanager
def _readable(name: str, builder: Builder) -> Iterator[None]:
    """Turn what TFDS raises about files that it cannot read into an error of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data set {name} in {builder.data_path} cannot be read ({first_line(error)}); "
            "prepare it again in another folder, and give that as --data_dir"
        ) from error


def _records(source: Source) -> Iterator[Record]:
    """Yield the features of every record, as they are stored."""
    from tensorflow_datasets.proto import tf_example_pb2

    for start in range(0, len(source), CHUNK):
        for record in source.__getitems__(range(start, min(start + CHUNK, len(source)))):
            yield tf_example_pb2.Example.FromString(record).features.feature


def _placed(
    name: str, images: np.ndarray | None, row: int, image: np.ndarray, count: int
) -> np.ndarray:
    """Return `images` with `image` in its row; grey ones join the colour ones, if there are any."""
    if images is None:
        images = np.empty((count, *image.shape), np.uint8)
    if image.shape[:2] != images.shape[1:3]:
        sizes = " and ".join(f"{w}x{h}" for h, w in (images.shape[1:3], image.shape[:2]))
        raise UserError(
            f"data set {name} holds images of different sizes ({sizes}); write them to a folder at "
            "one size and use folder:PATH"
        )
    if image.shape[2] > images.shape[3]:
        images = np.repeat(images, image.shape[2], 3)
    images[row] = image
    return images


def _label(record: Record, name: str | None) -> Label:
    """Return a record's label; None: it has none."""
    if name is None:
        return None
    words, numbers = record[name].bytes_list.value, record[name].int64_list.value
    if words:
        return str(words[0].decode(errors="replace").strip())
    return int(numbers[0]) if numbers else None


def _is_text(feature: Connector) -> bool:
    """Return whether it is a text, or a list of some."""
    kind = getattr(feature, "np_dtype", None)
    return isinstance(kind, (np.dtype, type)) and np.dtype(kind) == object
