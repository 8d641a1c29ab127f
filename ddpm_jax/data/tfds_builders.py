"""Import of TFDS on demand, and preparation of its data sets.

The builders of TFDS for MNIST, Fashion-MNIST and CIFAR-10 need TensorFlow to extract and encode
images.  The builders of this module are subclasses, which inherit the URLs and the checksums.  They
read the original files without TensorFlow and give PIL images to TFDS, which encodes such images
without TensorFlow.
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeAlias

import numpy as np
from PIL import Image

from ddpm_jax.errors import MissingData, UserError, printable

Library: TypeAlias = Any  # the module tensorflow_datasets, which has no types
Builder: TypeAlias = Any  # tfds.core.DatasetBuilder, which prepares and reads a data set
DownloadManager: TypeAlias = Any  # tfds.download.DownloadManager, which compares checksums
Connector: TypeAlias = Any  # tfds.features.FeatureConnector, or a subclass

PREPARED_HERE = ("mnist", "fashion_mnist", "cifar10")  # prepared without TensorFlow
PROBE_SECONDS = 3.0  # time limit for the answer of a host
NAME = re.compile(r"\w+(/[\w.\-]+)?(:[\d*]+(\.[\d*]+)*)?", re.ASCII)
TFDS_CLASS = re.compile(r"tensorflow_datasets(\.\w+)+", re.ASCII)
Examples: TypeAlias = Iterator[tuple[int, dict[str, str | int | Image.Image]]]


@functools.cache
def library() -> Library:
    """Import TFDS, prevent imports of feature classes that are not its own; return the module."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.redirect_stderr(io.StringIO()):
        import tensorflow_datasets as tfds
    logging.getLogger("absl").setLevel(logging.ERROR)
    _refuse_other_classes(tfds.features.FeatureConnector)
    return tfds


def _refuse_other_classes(connector: Connector) -> None:
    """Let `connector` raise ValueError for names of classes that are not part of TFDS.

    Otherwise TFDS imports every class that the files of a data set name. The files may be
    untrusted, and an import runs code.
    """
    original = connector.cls_from_name  # the only function that imports a class by its name

    def cls_from_name(cls: Connector, name: str) -> Connector:
        if not TFDS_CLASS.fullmatch(name):
            raise ValueError(
                f"features.json names the class {printable(name)[:80]}, which is not part of TFDS "
                "and is not imported; prepare the data set with features of TFDS"
            )
        return original(name)

    connector.cls_from_name = classmethod(cls_from_name)


def base_name(name: str) -> str:
    """Return the name of a data set without its config and version."""
    return name.partition("/")[0].partition(":")[0]


def is_known(name: str) -> bool:
    """Return whether TFDS itself has a builder for data set `name`."""
    return bool(NAME.fullmatch(name)) and base_name(name) in known_names()


@functools.cache
def known_names() -> tuple[str, ...]:
    """Return the names of the data sets for which TFDS itself has builders."""
    return tuple(library().list_builders(with_community_datasets=False))


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its type."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:500]


def prepare(
    name: str,
    builder: Builder,
    root: pathlib.Path,
    log: Callable[[str], None],
    manual_dir: str | None = None,
) -> Builder:
    """Download and prepare a data set below `root`, and return a builder that reads it.

    Args:
      name: The name of the data set. Data sets in `PREPARED_HERE` do not need TensorFlow.
      builder: The builder of TFDS for the data set.
      root: The directory of prepared data sets.
      log: The function that prints a line for the user.
      manual_dir: A directory of files that are already downloaded; TFDS compares their checksums.
        If None, the files are downloaded.

    Raises:
      MissingData: If the data set cannot be downloaded.
      UserError: If the preparation needs TensorFlow, or files cannot be read or written.
    """
    tfds = library()
    if name in PREPARED_HERE:
        with tfds.core.registered.skip_registration():
            builder = without_tensorflow(name)(data_dir=root)
    elif not have_tensorflow():
        raise UserError(
            f"data set {name} is not prepared in {root}, and TFDS needs TensorFlow to prepare "
            "it; pip install tensorflow, or prepare it on another machine and give --data_dir=DIR"
        )
    if manual_dir is None and not reachable(address(builder)):
        raise MissingData(
            f"data set {name} is not prepared in {root}, and its host does not answer; "
            "give --data_dir=DIR, a directory that contains it, or connect to a network"
        )
    log(f"preparing {name} in {root}")
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        make_folder(root)
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except UserError:
        raise
    except Exception as error:
        import requests

        network = isinstance(error, (requests.RequestException, urllib.error.URLError))
        download_failed = network or "DownloadError" in type(error).__name__
        error_type = MissingData if download_failed else UserError
        raise error_type(f"data set {name} could not be prepared: {first_line(error)}") from error
    return tfds.builder(name, data_dir=root)


# Builders that need no TensorFlow.


def without_tensorflow(name: str) -> type[Builder]:
    """Return a TFDS builder class that prepares a data set of `PREPARED_HERE` without TensorFlow.

    Raises:
      NotImplementedError: If `_generate_examples` of the builder is called, which TFDS does not do.
    """
    tfds = library()
    original = tfds.builder_cls(name)
    cifar = name == "cifar10"

    class Prepared(original):  # type: ignore[misc]
        """Builder that reads the original files with gzip or tarfile and yields PIL images."""

        @classmethod
        def _get_pkg_dir_path(cls) -> os.PathLike[str]:  # the directory of TFDS's checksums
            directory: os.PathLike[str] = original._get_pkg_dir_path()
            return directory

        def _split_generators(self, dl_manager: DownloadManager) -> dict[str, Examples]:
            if cifar:
                (path,) = dl_manager.download([address(self)])
                return {s: _cifar10(path, s) for s in ("train", "test")}
            urls = {
                (split, content): urllib.parse.urljoin(self.URL, f"{prefix}-{content}-ubyte.gz")
                for split, prefix in (("train", "train"), ("test", "t10k"))
                for content in ("images-idx3", "labels-idx1")
            }
            paths = dl_manager.download({"-".join(k): url for k, url in urls.items()})
            return {
                split: _idx(paths[f"{split}-images-idx3"], paths[f"{split}-labels-idx1"])
                for split in ("train", "test")
            }

        def _generate_examples(self) -> NoReturn:
            raise NotImplementedError("call _split_generators, which returns the examples")

    Prepared.name = name
    Prepared.__module__ = original.__module__
    return Prepared


def _idx(images: os.PathLike[str], labels: os.PathLike[str]) -> Examples:
    """Yield a pair (key, features) for each example of two gzipped IDX files, MNIST's format."""
    with gzip.open(str(images)) as file:  # the header has 16 bytes for images, 8 for labels
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(str(labels)) as file:
        values = np.frombuffer(file.read(), np.uint8, offset=8)
    for row, (image, label) in enumerate(zip(pixels, values, strict=True)):
        yield row, {"image": Image.fromarray(image), "label": int(label)}


def _cifar10(path: os.PathLike[str], split: str) -> Examples:
    """Yield a pair (key, features) for each example of a split of CIFAR-10's binary version.

    A record has one byte for the label, then 3 x 32 x 32 bytes for the pixels [channel, row,
    column]. As in TFDS, the key and the `id` of an example contain its position in the split.
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


# TFDS retries a failed download for minutes, so the connection is checked first.


def address(builder: Builder) -> str | None:
    """Return the URL from which TFDS downloads a data set; return None if it is unknown."""
    if hasattr(builder, "_cifar_info"):
        return str(builder._cifar_info.url)
    if hasattr(builder, "URL"):
        return urllib.parse.urljoin(str(builder.URL), "train-labels-idx1-ubyte.gz")
    return next(iter(getattr(builder, "url_infos", None) or {}), None)


def reachable(url: str | None, seconds: float = PROBE_SECONDS) -> bool:
    """Return whether the host of `url` answers a HEAD request within `seconds`.

    The time limit includes the look-up of the host name. If `url` is None, return True, because
    the download itself will fail if there is no connection.
    """
    if url is None:
        return True
    answered = threading.Event()

    def request_head() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # the host has answered
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=request_head, daemon=True)  # a look-up has no timeout
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def have_tensorflow() -> bool:
    """Return whether TensorFlow is installed."""
    return importlib.util.find_spec("tensorflow") is not None


def make_folder(root: pathlib.Path) -> None:
    """Create the directory `root` of data sets if it does not exist.

    Raises:
      UserError: If the directory cannot be created.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {root}: {error.strerror}; give --data_dir=DIR, a writable directory"
        ) from None
