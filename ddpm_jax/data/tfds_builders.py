"""TFDS, imported on demand, and builders of MNIST, Fashion-MNIST and CIFAR-10 without TensorFlow.

TFDS's own builders of these three need it to extract and encode.  TFDS encodes PIL images without
it, so the builders here are TFDS's, with its downloads and checksums, and only the reading of the
files is new.
"""

import contextlib
import functools
import gzip
import importlib.util
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
from typing import Any, NoReturn, TypeAlias

import numpy as np
from PIL import Image

from ddpm_jax.errors import UserError, printable

Library: TypeAlias = Any  # the module, which has no types
Builder: TypeAlias = Any  # TFDS's reader and preparer of one data set
DownloadManager: TypeAlias = Any  # TFDS's, which compares checksums
Connector: TypeAlias = Any  # TFDS's description of one feature, or its class

PREPARED_HERE = ("mnist", "fashion_mnist", "cifar10")
PROBE_SECONDS = 3.0
NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d*]+(\.[\d*]+)*)?", re.ASCII)
OWN_CLASS = re.compile(r"tensorflow_datasets(\.\w+)+", re.ASCII)
Examples: TypeAlias = Iterator[tuple[int, dict[str, str | int | Image.Image]]]


@functools.cache
def library() -> Library:
    """Import TFDS, which then imports no feature class but its own."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.redirect_stderr(io.StringIO()):
        import tensorflow_datasets as tfds
    logging.getLogger("absl").setLevel(logging.ERROR)
    _refuse_other_classes(tfds.features.FeatureConnector)
    return tfds


def _refuse_other_classes(connector: Connector) -> None:
    """Let TFDS import no feature class but its own: a file names it, which may be a stranger's."""
    find = connector.cls_from_name  # the one function that imports what a file names

    def own_alone(cls: Connector, name: str) -> Connector:
        if not OWN_CLASS.fullmatch(name):
            raise ValueError(
                f"features.json names the class {printable(name)[:80]}, which is not one of TFDS's "
                "own and is not imported; prepare the data set with features of TFDS"
            )
        return find(name)

    connector.cls_from_name = classmethod(own_alone)


def base_name(name: str) -> str:
    """Return the name of a data set without its config and version."""
    return name.partition("/")[0].partition(":")[0]


def is_known(name: str) -> bool:
    """Return whether TFDS itself has the builder of a data set."""
    return bool(NAME.fullmatch(name)) and base_name(name) in known_names()


@functools.cache
def known_names() -> tuple[str, ...]:
    """Return the data sets whose builders TFDS itself has."""
    return tuple(library().list_builders(with_community_datasets=False))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:500]


# Builders that need no TensorFlow.


def without_tensorflow(name: str) -> type[Builder]:
    """Return TFDS's builder of a data set, which reads the original files in another way.

    Raises:
      NotImplementedError: from the builder, if TFDS asks it for examples outside of a split.
    """
    tfds = library()
    original = tfds.builder_cls(name)
    cifar = name == "cifar10"

    class Prepared(original):  # type: ignore[misc]
        """TFDS's builder; its files are read with gzip and tarfile, its images through PIL."""

        @classmethod
        def _get_pkg_dir_path(cls) -> os.PathLike[str]:  # where TFDS keeps the checksums
            directory: os.PathLike[str] = original._get_pkg_dir_path()
            return directory

        def _split_generators(self, dl_manager: DownloadManager) -> dict[str, Examples]:
            if cifar:
                (path,) = dl_manager.download([address(self)])
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

        def _generate_examples(self) -> NoReturn:
            raise NotImplementedError("each split above is its own generator")

    Prepared.name = name
    Prepared.__module__ = original.__module__
    return Prepared


def _idx(images: os.PathLike[str], labels: os.PathLike[str]) -> Examples:
    """Yield the examples of gzipped IDX files: a header of 16 or 8 bytes, then raw bytes."""
    with gzip.open(str(images)) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(str(labels)) as file:
        numbers = np.frombuffer(file.read(), np.uint8, offset=8)
    for row, (image, number) in enumerate(zip(pixels, numbers, strict=True)):
        yield row, {"image": Image.fromarray(image), "label": int(number)}


def _cifar10(path: os.PathLike[str], split: str) -> Examples:
    """Yield the images of the binary version: a label, then 3 x 32 x 32 bytes, channels first.

    TFDS's `id` is the example's number within its split, and its keys are the same.
    """
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


def address(builder: Builder) -> str | None:
    """Return where a data set is downloaded from; None: it is not known."""
    if hasattr(builder, "_cifar_info"):
        return str(builder._cifar_info.url)
    if hasattr(builder, "URL"):
        return urllib.parse.urljoin(str(builder.URL), "train-labels-idx1-ubyte.gz")
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


def have_tensorflow() -> bool:
    """Return whether TensorFlow is installed."""
    return importlib.util.find_spec("tensorflow") is not None


def make_folder(root: pathlib.Path) -> None:
    """Make the folder of data sets, before anything is downloaded.

    Raises:
      UserError: it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror}") from None
