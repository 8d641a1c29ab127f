"""Any image data set of TFDS by name, read and (the usual three) prepared without TensorFlow.

`tfds.data_source` reads without TensorFlow, but TFDS's own builders of MNIST and CIFAR-10
need it to extract and encode.  TFDS encodes PIL images without it, so the builders here
are TFDS's, with its downloads and checksums, and only the reading of the files is new.
What was read once is kept beside the TFDS copy as a memory-mapped array: image by image
through `tfds.data_source` takes most of a millisecond each.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import logging
import os
import pathlib
import sys
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ddpm_jax.data.loader import Data, MissingData, Split, decoded_once, fingerprint
from ddpm_jax.errors import UserError, nearest
from ddpm_jax.tokens import LONGEST, fitting, tokenize, untokenize

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
PREPARED_HERE = ("mnist", "fashion_mnist", "cifar10")
CAPTIONS = ("caption", "captions", "text", "description")  # names of a feature, the first of them
PROBE_SECONDS = 3.0
CHUNK = 1000  # records read at a time


def load(name: str, data_dir: str | None) -> Data:
    """Read TFDS data set `name` (`NAME[/CONFIG][:VERSION]`), preparing it where needed.

    Raises:
      MissingData: it is not prepared and its host does not answer within 3 seconds.
      UserError: TFDS knows no such data set, it holds no images of one size, or it needs
        TensorFlow to be prepared.
    """
    tfds = _import()
    root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        known = [*tfds.list_builders(with_community_datasets=False), "digits"]
        hint = nearest(name.split("/")[0].split(":")[0], known)
        raise UserError(f'there is no data set "{name}"{hint}') from None
    except Exception as error:
        if type(error).__module__.startswith("tensorflow_datasets") or isinstance(
            error, (ValueError, ImportError, OSError, AssertionError)
        ):
            raise UserError(f"data set {name}: {_line(error)}") from None
        raise
    folder = pathlib.Path(str(builder.data_path))
    if not (folder / "dataset_info.json").exists():
        builder = prepare(builder.name if name in PREPARED_HERE else name, builder, root)
        folder = pathlib.Path(str(builder.data_path))
    stamp = hashlib.sha256(f"4 {name}".encode())  # the number of this reader's version
    for path in sorted(folder.glob("*")):
        if path.is_file():
            stat = path.stat()
            stamp.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return decoded_once(folder / "decoded", stamp.hexdigest(), lambda: _decode(name, builder))


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
    if manual_dir is None and not _reachable(_address(builder)):
        raise MissingData(
            f"data set {name} is not prepared in {root}, and its host does not answer; "
            "give --data_dir=DIR where it is prepared, or try again with a network"
        )
    print(f"preparing {name} in {root}", file=sys.stderr)
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


def _decode(name: str, builder: Any) -> Data:
    splits = builder.info.splits
    held_out = [s for s in ("test", "validation", "val") if s in splits]
    test = next(iter(held_out), None)
    if "train" not in splits:
        raise UserError(f"data set {name} has no train split, only {', '.join(splits)}")
    features = builder.info.features
    if not isinstance(dict(features).get("image"), _import().features.Image):
        raise UserError(f"data set {name} holds no images: its features are {', '.join(features)}")
    print(f"decoding {name}, once", file=sys.stderr)
    label = "label" if "label" in features and features["label"].shape == () else None
    told = next((name for name in CAPTIONS if name in features and _is_text(features[name])), None)
    train = _read(name, builder, "train", label, told)
    parts: tuple[Split, ...]
    notes: tuple[str, ...] = ()
    if test is None:  # every tenth example is held out
        held_out = np.arange(len(train.images)) % 10 == 9
        parts = train.rows(np.flatnonzero(~held_out)), train.rows(np.flatnonzero(held_out))
        notes = ("it has no test split: every tenth training example is held out instead",)
    else:
        parts = train, _read(name, builder, test, label, told)
    if len(held_out) > 1:
        parts = *parts, _read(name, builder, held_out[1], label, told)
    if told:
        needed = max(fitting(untokenize(part.captions)) for part in parts)
        parts = tuple(part._replace(captions=part.captions[:, :needed]) for part in parts)
    classes = tuple(getattr(features[label], "names", ())) if label else ()
    return Data(
        name=name,
        title=TITLES.get(builder.name, builder.name),
        train=parts[0],
        test=parts[1],
        validation=parts[2] if len(parts) > 2 else None,
        levels=256,
        classes=classes,
        fingerprint=fingerprint(*parts),
        notes=notes,
    )


def _read(name: str, builder: Any, split: str, label: str | None, told: str | None) -> Split:
    """Every example of a split.

    The records come in bulk from TFDS's data source, and only the two features that are
    wanted are parsed and decoded: a fifth of the time of example after example.
    """
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    images: Any = None
    labels: Any = None
    captions: list[str] = []
    row = 0
    try:
        records = builder.as_data_source(split).data_source
        for start in range(0, len(records), CHUNK):
            chunk = range(start, min(start + CHUNK, len(records)))
            for record in records.__getitems__(chunk):
                feature = tf_example_pb2.Example.FromString(record).features.feature
                encoded = feature["image"].bytes_list.value[0]
                image = _opaque(np.asarray(Image.open(io.BytesIO(encoded))))
                if image.dtype != np.uint8:
                    raise UserError(f"data set {name} holds {image.dtype} images, not uint8 ones")
                if images is None:
                    images = np.empty((len(records), *image.shape), np.uint8)
                    labels = np.full(len(records), -1, np.int32)
                elif image.shape != images.shape[1:]:
                    raise UserError(
                        f"data set {name} holds images of different sizes ({images.shape[1:]} "
                        f"and {image.shape}); write them to a folder at one size and use "
                        "folder:PATH"
                    )
                images[row] = image
                if label:
                    labels[row] = feature[label].int64_list.value[0]
                if told:  # the first of several
                    words = feature[told].bytes_list.value
                    captions.append(words[0].decode(errors="replace") if words else "")
                row += 1
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data set {name} in {builder.data_path} cannot be read ({_line(error)}); "
            "remove that folder to have it prepared again"
        ) from error
    if images is None:
        raise UserError(f"split {split} of data set {name} is empty")
    return Split(images, labels, tokenize(captions, LONGEST) if told else None)


def _is_text(feature: Any) -> bool:
    """Whether it is a text, or a list of some."""
    kind = getattr(feature, "np_dtype", None)
    return isinstance(kind, (np.dtype, type)) and np.dtype(kind) == object


def _opaque(image: np.ndarray) -> np.ndarray:
    """[H, W] -> [H, W, 1]; transparency laid on white: [H, W, 4] -> [H, W, 3]."""
    if image.ndim == 2:
        return image[..., None]
    if image.shape[-1] != 4:
        return image
    alpha = image[..., 3:] / 255
    return np.round(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


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


def _reachable(url: str | None) -> bool:
    """Whether a HEAD request is answered within `PROBE_SECONDS`, name look-up included."""
    if url is None:
        return True  # no address to ask: TFDS finds out
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
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
    return tfds


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
