"""Cache of decoded data sets, as memory-mapped arrays in the user's cache directory."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import numpy as np

from ddpm_jax.data.types import SPLITS, Data, RowArray, Split
from ddpm_jax.fields import Json

# A cached data set is a directory with meta.json and, for each split, SPLIT_images.npy,
# SPLIT_labels.npy and, if there are captions, SPLIT_captions.npy.


def cache_dir() -> pathlib.Path:
    """Return $XDG_CACHE_HOME/ddpm_jax, or ~/.cache/ddpm_jax if the variable is not set."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(root) / "ddpm_jax"


def load_decoded(source: pathlib.Path, stamp: str, decode: Callable[[], Data]) -> Data:
    """Return a decoded data set from the user's cache.

    If the data set is not in the cache, or if the stamp has changed, call `decode` and write the
    result to the cache. Notes for the user about the cache are appended to `Data.notes`.

    Args:
      source: The directory of the original files. Nothing is written there.
      stamp: A text that changes when the original files change.
      decode: A function that reads and decodes the original files.
    """
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    directory = cache_dir() / "decoded" / name
    cached = _read_decoded(directory, stamp)
    if cached is not None:
        return cached
    notes: list[str] = []
    if (directory / "meta.json").exists():
        notes.append(
            f"the images were decoded again, because the cache {directory} is damaged or the "
            "original files have changed"
        )
    data = decode()
    try:
        _write_decoded(directory, stamp, data)
    except OSError as error:
        notes.append(
            f"cannot write the cache {directory} ({error.strerror}); the images will be "
            "decoded again at the next start"
        )
        cached = data
    else:
        cached = _read_decoded(directory, stamp) or data
    return cached._replace(notes=(*cached.notes, *notes))


def fingerprint(*splits: Split | None) -> str:
    """Return a hash of the arrays of all splits, 16 hexadecimal digits; None is ignored."""
    digest = hashlib.sha256()
    for split in (split for split in splits if split is not None):
        for array in (array for array in split if array is not None):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _read_decoded(directory: pathlib.Path, stamp: str) -> Data | None:
    """Return a cached data set; return None if it is missing, damaged or has another stamp."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        if meta.pop("stamp") != stamp:
            return None
        array_specs = meta.pop("forms")
        splits = {split: _read_split(directory, split) for split in SPLITS if split in array_specs}
        if {split: _array_specs(part) for split, part in splits.items()} != array_specs:
            return None
        meta |= {"classes": tuple(meta["classes"]), "notes": tuple(meta["notes"])}
        parts: dict[str, Json] = {"validation": None, **splits}
        data = Data(**parts, **meta)
        _check_decoded(data)
    except Exception:  # a damaged file may raise any exception
        return None
    return data


def _read_split(directory: pathlib.Path, split: str) -> Split:
    captions = directory / f"{split}_captions.npy"
    return Split(
        np.load(directory / f"{split}_images.npy", mmap_mode="r", allow_pickle=False),
        np.load(directory / f"{split}_labels.npy", allow_pickle=False),
        np.load(captions, allow_pickle=False) if captions.exists() else None,
    )


def _check_decoded(data: Data) -> None:
    """Raise ValueError if the arrays or the description of a cached data set are not valid."""
    captions = data.train.captions
    for part in (data.train, data.validation, data.test):
        if part is None:
            continue
        count = len(part.images)
        labels = np.asarray(part.labels)
        expected: list[tuple[RowArray, type[np.generic], tuple[int, ...]]] = [
            (part.images, np.uint8, (count, *data.shape)),
            (labels, np.int32, (count,)),
        ]
        if captions is not None:
            expected.append((part.captions, np.uint8, (count, captions.shape[1])))
        if (captions is None) != (part.captions is None) or any(
            array.dtype != dtype or array.shape != shape for array, dtype, shape in expected
        ):
            raise ValueError("an array of the cached data set has a wrong shape or dtype")
        if count and not -1 <= labels.min() <= labels.max() < max(len(data.classes), 1):
            raise ValueError("a label of the cached data set is not the index of a class")
    texts = (data.name, data.title, data.fingerprint, *data.classes, *data.notes)
    if not all(isinstance(text, str) for text in texts) or data.levels != 256:
        raise ValueError("a name or note of the cached data set is not text, or levels is not 256")


def _array_specs(split: Split | None) -> Json:
    """Return the lists [shape, dtype] of a split's arrays that are not None, for JSON."""
    return [[list(a.shape), str(a.dtype)] for a in split or () if a is not None]


def _write_decoded(directory: pathlib.Path, stamp: str, data: Data) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=directory.name + ".", dir=directory.parent))
    try:
        for split in SPLITS:
            part = getattr(data, split)
            if part is None:
                continue
            np.save(draft / f"{split}_images.npy", part.images)
            np.save(draft / f"{split}_labels.npy", part.labels)
            if part.captions is not None:
                np.save(draft / f"{split}_captions.npy", part.captions)
        meta = {key: getattr(data, key) for key in Data._fields if key not in SPLITS}
        parts = {split: getattr(data, split) for split in SPLITS}
        meta["forms"] = {
            name: _array_specs(part) for name, part in parts.items() if part is not None
        }
        (draft / "meta.json").write_text(json.dumps({"stamp": stamp, **meta}))
        draft.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        draft.rename(directory)  # atomic, also if another process writes the same data set
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
