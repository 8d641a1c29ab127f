"""Decoded images in the user's cache, as memory-mapped arrays."""

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

# Decoded once: a folder with images.npy and labels.npy per split, and meta.json.


def cache_dir() -> pathlib.Path:
    """Return the folder of the cache: $XDG_CACHE_HOME/ddpm_jax or ~/.cache/ddpm_jax."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(root) / "ddpm_jax"


def decoded_once(source: pathlib.Path, stamp: str, decode: Callable[[], Data]) -> Data:
    """Return `decode()`, kept in the user's cache as memory-mapped arrays for the next time.

    Args:
      source: the folder that the data come from; nothing is written there.
      stamp: changes when what was decoded changes.
    """
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    place = cache_dir() / "decoded" / name
    kept = _read_decoded(place, stamp)
    if kept is not None:
        return kept
    notes: list[str] = []
    if (place / "meta.json").exists():
        notes.append(f"decoded again: {place} is damaged, or of other files")
    data = decode()
    try:
        _write_decoded(place, stamp, data)
    except OSError as error:
        notes.append(f"cannot write {place} ({error.strerror}): decoded again at the next start")
        kept = data
    else:
        kept = _read_decoded(place, stamp) or data
    return kept._replace(notes=(*kept.notes, *notes))


def fingerprint(*splits: Split | None) -> str:
    """Return a hash of every image and label; None is a split that there is not."""
    digest = hashlib.sha256()
    for split in (split for split in splits if split is not None):
        for array in (array for array in split if array is not None):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _read_decoded(place: pathlib.Path, stamp: str) -> Data | None:
    try:
        meta = json.loads((place / "meta.json").read_text())
        if meta.pop("stamp") != stamp:
            return None
        forms = meta.pop("forms")
        splits = {split: _read_split(place, split) for split in SPLITS if split in forms}
        if {split: _forms(part) for split, part in splits.items()} != forms:
            return None
        meta |= {"classes": tuple(meta["classes"]), "notes": tuple(meta["notes"])}
        parts: dict[str, Json] = {"validation": None, **splits}
        data = Data(**parts, **meta)
        _check_decoded(data)
    except Exception:
        return None  # absent, torn, of another time or whatever else: decoded anew
    return data


def _read_split(place: pathlib.Path, split: str) -> Split:
    captions = place / f"{split}_captions.npy"
    return Split(
        np.load(place / f"{split}_images.npy", mmap_mode="r", allow_pickle=False),
        np.load(place / f"{split}_labels.npy", allow_pickle=False),
        np.load(captions, allow_pickle=False) if captions.exists() else None,
    )


def _check_decoded(data: Data) -> None:
    """Raise ValueError unless the arrays of all splits belong together."""
    captions = data.train.captions
    for part in (data.train, data.validation, data.test):
        if part is None:
            continue
        count = len(part.images)
        labels = np.asarray(part.labels)
        known: list[tuple[RowArray, type[np.generic], tuple[int, ...]]] = [
            (part.images, np.uint8, (count, *data.shape)),
            (labels, np.int32, (count,)),
        ]
        if captions is not None:
            known.append((part.captions, np.uint8, (count, captions.shape[1])))
        if (captions is None) != (part.captions is None) or any(
            array.dtype != kind or array.shape != shape for array, kind, shape in known
        ):
            raise ValueError("arrays that do not belong together")
        if count and not -1 <= labels.min() <= labels.max() < max(len(data.classes), 1):
            raise ValueError("labels that are not classes")
    texts = (data.name, data.title, data.fingerprint, *data.classes, *data.notes)
    if not all(isinstance(text, str) for text in texts) or data.levels != 256:
        raise ValueError("a description that is not text")


def _forms(split: Split | None) -> Json:
    """Return the shape and the type of each array, as JSON has them."""
    return [[list(a.shape), str(a.dtype)] for a in split or () if a is not None]


def _write_decoded(place: pathlib.Path, stamp: str, data: Data) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=place.name + ".", dir=place.parent))
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
        meta["forms"] = {name: _forms(part) for name, part in parts.items() if part is not None}
        (draft / "meta.json").write_text(json.dumps({"stamp": stamp, **meta}))
        draft.chmod(0o755)
        if place.exists():
            shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)  # whole or not at all, whoever else writes it meanwhile
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
