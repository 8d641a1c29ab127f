"""Any image data set of TFDS by name, read and (the usual three) prepared without TensorFlow.

`tfds.data_source` reads without TensorFlow, but TFDS's own builders of MNIST and CIFAR-10
need it to extract and encode.  TFDS encodes PIL images without it, so the builders here
are TFDS's, with its downloads and checksums, and only the reading of the files is new.
What was read once is kept in the user's cache as a memory-mapped array: image by image
through `tfds.data_source` takes most of a millisecond each.

A prepared data set may be a stranger's.  TFDS would import whatever module its `features.json`
names; here every class but TFDS's own is refused.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import logging
import os
import pathlib
import re
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.cache import decoded_once, fingerprint
from ddpm_jax.data.captions import usable_captions
from ddpm_jax.data.images import DARK_NOTE, decode, decoding, reason_of
from ddpm_jax.data.split_names import split_folders
from ddpm_jax.data.types import Data, Split
from ddpm_jax.errors import MissingData, UserError, nearest, printable
from ddpm_jax.system.terminal import print_error

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
PREPARED_HERE = ("mnist", "fashion_mnist", "cifar10")
CAPTIONS = ("caption", "captions", "text", "description")  # names of a feature, the first of them
NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d*]+(\.[\d*]+)*)?", re.ASCII)
OWN_CLASS = re.compile(r"tensorflow_datasets(\.\w+)+", re.ASCII)
VERSION = 5  # of what is kept: another where the same records are read in another way
PROBE_SECONDS = 3.0
CHUNK = 1000  # records read at a time
MANY = 5000  # records, from which on it takes seconds to decode them


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
    tfds = _import()
    root = pathlib.Path(os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)).absolute()
    try:
        if not NAME.fullmatch(name):
            raise tfds.core.DatasetNotFoundError(name)
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        hint = nearest(base_name(name), [*known_names(), "digits"])
        raise UserError(f'there is no data set "{printable(name)}"{hint}') from None
    except Exception as error:  # whatever TFDS raises of a name or of damaged files
        raise UserError(f"data set {name}: {_line(error)}") from None
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


def base_name(name: str) -> str:
    """The name of a data set without its config and version."""
    return name.partition("/")[0].partition(":")[0]


def is_known(name: str) -> bool:
    """Whether TFDS itself has the builder of a data set."""
    return bool(NAME.fullmatch(name)) and base_name(name) in known_names()


@functools.cache
def known_names() -> tuple[str, ...]:
    """The data sets whose builders TFDS itself has."""
    return tuple(_import().list_builders(with_community_datasets=False))


def prepare(name: str, builder: Any, root: pathlib.Path, manual_dir: str | None = None) -> Any:
    """Download and prepare a data set below `root`; returns a builder that can read it.

    Args:
      name: MNIST, Fashion-MNIST and CIFAR-10 need no TensorFlow; others may.
      builder: TFDS's own builder of it.
      manual_dir: a folder of files that were downloaded already; checksums are compared.
    """
    tfds = _import()
    here = name in PREPARED_HERE
    if here:
        with tfds.core.registered.skip_registration():
            builder = _without_tensorflow(name)(data_dir=root)
    elif not _have_tensorflow():
        raise UserError(
            f"data set {name} is not prepared in {root}, and TFDS needs TensorFlow to prepare "
            "it: pip install tensorflow, or prepare it elsewhere and give --data_dir"
        )
    if manual_dir is None and not reachable(_address(builder)):
        raise MissingData(
            f"data set {name} is not prepared in {root}, and its host does not answer; "
            "give --data_dir=DIR where it is prepared, or try again with a network"
        )
    print_error(f"preparing {name} in {root}")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        _make_folder(root)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except UserError:
        raise
    except Exception as error:
        import requests

        network = isinstance(error, (requests.RequestException, urllib.error.URLError))
        kind = MissingData if network or "DownloadError" in type(error).__name__ else UserError
        raise kind(f"data set {name} could not be prepared: {_line(error)}") from error
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
    labels: list[Any]
    captions: list[str]
    notes: tuple[str, ...]

    def rows(self, rows: np.ndarray) -> "_Examples":
        """Return the examples at some rows, without the notes of the whole."""
        captions = [self.captions[row] for row in rows] if self.captions else []
        return _Examples(self.images[rows], [self.labels[row] for row in rows], captions, ())


def _decode(name: str, builder: Any) -> Data:
    splits = split_folders(builder.info.splits)
    if "train" not in splits:
        raise UserError(
            f"data set {name} has no train split, only {', '.join(builder.info.splits)}"
        )
    features = _features(name, builder.info.features)
    if builder.info.splits.total_num_examples > MANY:
        print_error(f"decoding {name}, once")
    names = {split: some[0] for split, some in splits.items()}
    if "test" not in names and "validation" in names:  # the only held-out images are for the end
        names["test"] = names.pop("validation")
    order = [split for split in ("train", "test", "validation") if split in names]
    read = {split: _read(name, builder, names[split], features) for split in order}
    notes = features.notes + tuple(note for some in read.values() for note in some.notes)
    if "test" not in read:  # every tenth example is held out
        held_out = np.arange(len(read["train"].images)) % 10 == 9
        train, test = (read["train"].rows(np.flatnonzero(r)) for r in (~held_out, held_out))
        read = {"train": train, "test": test}
        notes += ("it has no test split: every tenth training example is held out instead",)
    left = sorted(set(builder.info.splits) - set(names.values()))
    if left:
        notes += (f"its splits {', '.join(left)} are not used",)
    labels, classes = _labels(name, features, {s: some.labels for s, some in read.items()})
    parts = {s: Split(some.images, labels[s]) for s, some in read.items()}
    if features.caption:
        tokens, odd = usable_captions({s: some.captions for s, some in read.items()})
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


def _features(name: str, features: Any) -> _Features:
    """Which features of a data set are read."""
    library = _import().features
    features = dict(features) if isinstance(features, library.FeaturesDict) else {}
    image = features.get("image")
    if not isinstance(image, library.Image):
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
    if isinstance(label, library.ClassLabel) and label.num_classes is not None:
        return _Features("label", tuple(label.names), caption)
    if _is_scalar(label) and (_is_text(label) or np.dtype(label.np_dtype).kind in "iub"):
        return _Features("label", None, caption)
    return _Features(None, None, caption, ("its labels are no classes, and are not used",))


def _labels(
    name: str, features: _Features, found: dict[str, list[Any]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Numbers of classes [N] by split, -1 where there is none, and the classes.

    Where the data set names no classes, they are the different labels, sorted.
    """
    missing = (None, -1, "")
    present = {label for labels in found.values() for label in labels if label not in missing}
    if features.classes is None:
        numbers = {label: number for number, label in enumerate(sorted(present))}
        classes = tuple(str(label) for label in numbers)
    else:
        classes = features.classes
        numbers = {number: number for number in range(len(classes))}
        if odd := present - numbers.keys():
            raise UserError(f"data set {name} has a label {min(odd)}, and {len(classes)} classes")
    return {
        split: np.array([numbers.get(label, -1) for label in labels], np.int32)
        for split, labels in found.items()
    }, classes


def _read(name: str, builder: Any, split: str, features: _Features) -> _Examples:
    """Every example of a split that can be decoded.

    The records come in bulk from TFDS's data source, and only the features that are
    wanted are parsed and decoded: a fifth of the time of example after example.
    """
    images: Any = None
    found = _Examples(np.empty(0), [], [], ())
    corrupt: list[str] = []
    animated = dark = 0
    with decoding(), _readable(name, builder):
        source = builder.as_data_source(split).data_source
        for number, feature in enumerate(_records(source)):
            encoded = feature["image"].bytes_list.value
            try:
                image, moves, dim = decode(encoded[0] if encoded else b"")
            except Exception as error:  # Pillow raises whatever its decoders raise
                corrupt.append(f"number {number} ({reason_of(error)})")
                continue
            row = len(found.labels)
            images = _placed(name, images, row, image, len(source))
            animated += moves
            dark += dim
            found.labels.append(_label(feature, features.label))
            if features.caption:  # the first of several
                words = feature[features.caption].bytes_list.value
                found.captions.append(words[0].decode(errors="replace").strip() if words else "")
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
    return found._replace(images=images[: len(found.labels)], notes=notes)


@contextlib.contextmanager
def _readable(name: str, builder: Any) -> Iterator[None]:
    """Whatever TFDS raises of files that it cannot read is one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data set {name} in {builder.data_path} cannot be read ({_line(error)}); "
            "prepare it again in another folder, and give that as --data_dir"
        ) from error


def _records(source: Any) -> Iterator[Any]:
    """The features of every record, as they are stored."""
    from tensorflow_datasets.proto import tf_example_pb2

    for start in range(0, len(source), CHUNK):
        for record in source.__getitems__(range(start, min(start + CHUNK, len(source)))):
            yield tf_example_pb2.Example.FromString(record).features.feature


def _placed(name: str, images: Any, row: int, image: np.ndarray, count: int) -> np.ndarray:
    """`images` with `image` in its row; grey ones join the colour ones, if there are any."""
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


def _label(feature: Any, name: str | None) -> int | str | None:
    """A record's label; None: it has none."""
    if name is None:
        return None
    words, numbers = feature[name].bytes_list.value, feature[name].int64_list.value
    if words:
        return words[0].decode(errors="replace").strip()
    return numbers[0] if numbers else None


def _is_text(feature: Any) -> bool:
    """Whether it is a text, or a list of some."""
    kind = getattr(feature, "np_dtype", None)
    return isinstance(kind, (np.dtype, type)) and np.dtype(kind) == object


def _is_scalar(feature: Any) -> bool:
    return getattr(feature, "shape", None) == ()


# Builders that need no TensorFlow.


def _without_tensorflow(name: str) -> type:
    tfds = _import()
    original = tfds.builder_cls(name)
    cifar = name == "cifar10"

    class Builder(original):  # type: ignore[valid-type,misc]
        """TFDS's builder; its files are read with gzip and tarfile, its images through PIL."""

        @classmethod
        def _get_pkg_dir_path(cls):  # where TFDS keeps this data set's checksums
            return original._get_pkg_dir_path()

        def _split_generators(self, dl_manager):
            if cifar:
                (path,) = dl_manager.download([_address(self)])
                return {s: _cifar10(path, s) for s in ("train", "test")}
            urls = {
                (split, kind): urllib.parse.urljoin(self.URL, f"{prefix}-{kind}-ubyte.gz")
                for split, prefix in (("train", "train"), ("test", "t10k"))
                for kind in ("images-idx3", "labels-idx1")
            }
            paths = dl_manager.download({"-".join(k): url for k, url in urls.items()})
            return {
                split: _idx(paths[f"{split}-images-idx3"], paths[f"{split}-labels-idx1"])
                for split in ("train", "test")
            }

        def _generate_examples(self):
            raise NotImplementedError("each split above is its own generator")

    Builder.name = name
    Builder.__module__ = original.__module__
    return Builder


def _idx(images: Any, labels: Any) -> Iterator[tuple[int, dict]]:
    """Gzipped IDX files: a header of 16 or 8 bytes, then raw bytes."""
    from PIL import Image

    with gzip.open(str(images)) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(str(labels)) as file:
        numbers = np.frombuffer(file.read(), np.uint8, offset=8)
    for row, (image, number) in enumerate(zip(pixels, numbers, strict=True)):
        yield row, {"image": Image.fromarray(image), "label": int(number)}


def _cifar10(path: Any, split: str) -> Iterator[tuple[int, dict]]:
    """The binary version: per image a label, then 3 x 32 x 32 bytes, channels first.

    TFDS's `id` is the example's number within its split, and its keys are the same.
    """
    from PIL import Image

    batches = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    row = 0
    with tarfile.open(str(path)) as archive:
        for batch in batches:
            file = archive.extractfile(f"cifar-10-batches-bin/{batch}.bin")
            assert file is not None
            records = np.frombuffer(file.read(), np.uint8).reshape(-1, 3073)
            for record in records:
                image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield (
                    row,
                    {
                        "id": f"{split}_{row:05d}",
                        "image": Image.fromarray(np.ascontiguousarray(image)),
                        "label": int(record[0]),
                    },
                )
                row += 1


# The network: known to be there, or not, before TFDS tries for minutes.


def _address(builder: Any) -> str | None:
    if hasattr(builder, "_cifar_info"):
        return builder._cifar_info.url
    if hasattr(builder, "URL"):
        return urllib.parse.urljoin(builder.URL, "train-labels-idx1-ubyte.gz")
    return next(iter(getattr(builder, "url_infos", None) or {}), None)


def reachable(url: str | None, seconds: float = PROBE_SECONDS) -> bool:
    """Return whether a HEAD request is answered within `seconds`, name look-up included."""
    if url is None:
        return True  # no address to ask: TFDS finds out
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


def _have_tensorflow() -> bool:
    import importlib.util

    return importlib.util.find_spec("tensorflow") is not None


@functools.cache
def _import() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.redirect_stderr(io.StringIO()):
        import tensorflow_datasets as tfds
    logging.getLogger("absl").setLevel(logging.ERROR)
    _refuse_other_classes(tfds.features.FeatureConnector)
    return tfds


def _refuse_other_classes(connector: Any) -> None:
    """Let TFDS import no feature class but its own: a file names it, which may be a stranger's."""
    find = connector.cls_from_name  # the one function that imports what a file names

    def own_alone(cls: Any, name: str) -> Any:
        if not OWN_CLASS.fullmatch(name):
            raise ValueError(
                f"features.json names the class {printable(name)[:80]}, which is not one of TFDS's "
                "own and is not imported; prepare the data set with features of TFDS"
            )
        return find(name)

    connector.cls_from_name = classmethod(own_alone)


def _make_folder(root: pathlib.Path) -> None:
    """A folder that cannot be written is told before anything is downloaded."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror}") from None


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:500]
