"""`folder:PATH`: images of the user's own, with labels from sub-folders.

A sub-folder `train`, and `validation` and `test` beside it, are the splits (`SPLIT_NAMES` has
their other names).  Where there is no `test`, `validation` is the test split; where there is
neither, one file in ten, chosen by a hash of its name, is held out for testing.  A split's own
sub-folders are its classes; an image beside them has no class.  A single folder of nothing but
folders is passed: the splits and classes are those within it.  All images must have one size; a
file that cannot be decoded is named, skipped and counted, and one of another ending is counted.

Names that begin with a dot and what other programs leave behind (`SKIPPED`) are not read.  A linked
folder is read once.  `captions.py` describes the files of captions.
"""

import hashlib
import os
import pathlib
import stat
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.cache import decoded_once, fingerprint
from ddpm_jax.data.captions import TABLES, is_captions, read_captions, usable_captions
from ddpm_jax.data.folder_splits import find_splits, resolve_hashed
from ddpm_jax.data.images import DARK_NOTE, ENDINGS, Decoded, decode, decoding, reason_of
from ddpm_jax.data.types import SPLITS, Data, Split
from ddpm_jax.errors import UserError, printable

VERSION = 5  # of what is kept: another where the same files are read in another way
SKIPPED = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
OF_SYSTEMS = {"thumbs.db", "desktop.ini"}  # files that are not counted
SHOWN = 5  # names in a note


class Listing(NamedTuple):
    """What lies below a folder.

    images, captions: paths from the folder, sorted.
    stamp: changes when a file or its content changes.
    notes: what was not read, and why.
    others: notes on files of other endings, which change nothing of what is read.
    """

    images: list[pathlib.PurePath]
    captions: list[pathlib.PurePath]
    stamp: str
    notes: tuple[str, ...]
    others: tuple[str, ...]


def load(argument: str, data_dir: str | None) -> Data:
    """Return the images below folder `argument`.

    Raises:
      UserError: there is no such folder, it holds no images, or a file in it is wrong.
    """
    del data_dir
    path = os.path.expanduser(argument)
    if not argument or not os.path.isdir(path):
        raise UserError(
            f'there is no folder "{printable(argument)}"; give one as --config.data=folder:PATH'
        )
    root = pathlib.Path(path).resolve()
    listing = list_files(root)
    if not listing.images:
        endings = ", ".join(sorted(ENDINGS))
        notes = (*listing.notes, *listing.others)
        raise UserError(
            "; ".join([f"there are no images in {root} (looked for {endings})", *notes])
        )
    splits = find_splits(root, listing.images)
    stamp = f"{VERSION} {listing.stamp}"
    data = decoded_once(root, stamp, lambda: _decode(root, listing, *splits))
    return data._replace(notes=(*data.notes, *map(printable, listing.others)))


def list_files(root: pathlib.Path) -> Listing:
    """Find the images and the files of captions below a folder."""
    images: list[pathlib.PurePath] = []
    captions: list[pathlib.PurePath] = []
    odd: list[str] = []
    notes: list[str] = []
    others: list[pathlib.PurePath] = []
    digest = hashlib.sha256()
    for folder, names in _folders(root, notes):
        for name in names:
            image, caption = pathlib.PurePath(name).suffix.lower() in ENDINGS, is_captions(name)
            if not (image or caption):
                others.append(folder / name)
                continue
            path = folder / name
            try:
                status = (root / path).stat()
            except OSError as error:
                odd.append(f"{path} ({error.strerror})")
                continue
            if not stat.S_ISREG(status.st_mode):
                odd.append(f"{path} (not a regular file)")
                continue
            (images if image else captions).append(path)
            line = f" {status.st_size} {status.st_mtime_ns}\n"
            digest.update(os.fsencode(path) + line.encode())
    if odd:
        notes.append(f"skipped {len(odd)} names that are not files: {_shown(odd)}")
    digest.update("\n".join(notes).encode(errors="surrogateescape"))
    return Listing(
        sorted(images, key=lambda path: path.parts),
        sorted(captions, key=lambda path: path.parts),
        digest.hexdigest(),
        tuple(notes),
        _others(others),
    )


def _others(paths: list[pathlib.PurePath]) -> tuple[str, ...]:
    """Return notes on the files that are neither images nor captions."""
    notes: tuple[str, ...] = ()
    tables = [path for path in paths if path.suffix.lower() in (".jsonl", ".csv")]
    if tables:
        notes += (
            f"{len(tables)} tables are not read, such as {tables[0]}: captions are read from "
            f"{' and '.join(TABLES)}",
        )
    endings = Counter(
        path.suffix.lower() or "no ending"
        for path in paths
        if path not in tables and path.name.lower() not in OF_SYSTEMS
    )
    if endings:
        ordered = sorted(endings.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = [f"{ending} ({count})" for ending, count in ordered]
        notes += (f"left out {endings.total()} files of other endings: {_shown(shown)}",)
    return notes


def _folders(root: pathlib.Path, notes: list[str]) -> Iterator[tuple[pathlib.PurePath, list[str]]]:
    """Yield each folder below `root`, from `root`, with the names of its files.

    Linked folders come last, each once, so that a folder keeps its own name beside links to it.
    """
    seen: set[str] = set()
    waiting = [str(root)]

    def unreadable(error: OSError) -> None:
        notes.append(f"cannot read the folder {error.filename}: {error.strerror}")

    while waiting:
        for folder, folders, files in os.walk(waiting.pop(0), onerror=unreadable):
            real = os.path.realpath(folder)
            if real in seen:
                notes.append(f"the folder {folder} is not read again: {real} is read already")
                folders.clear()
                continue
            seen.add(real)
            kept = sorted(name for name in folders if not _is_skipped(name))
            for name in kept:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    continue
                target = os.path.realpath(path)
                if os.path.commonpath([target, real]) == target:
                    notes.append(f"the linked folder {path} is not read: it leads to {target}, "
                                 "which it lies in")  # fmt: skip
                else:
                    waiting.append(path)
            folders[:] = [name for name in kept if not os.path.islink(os.path.join(folder, name))]
            names = sorted(name for name in files if not _is_skipped(name))
            yield pathlib.PurePath(folder).relative_to(root), names


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name.lower() in SKIPPED


def _decode(
    root: pathlib.Path,
    listing: Listing,
    inner: list[pathlib.PurePath],
    splits: np.ndarray,
    passed: str,
) -> Data:
    images, kept, notes = _decoded(root, listing.images)
    paths = [listing.images[row] for row in kept]
    inner = [inner[row] for row in kept]
    splits = resolve_hashed(inner, splits[kept])
    names = [path.parts[0] if len(path.parts) > 1 else "" for path in inner]
    keep = splits != ""
    classes = tuple(sorted({n for n, k in zip(names, keep, strict=True) if n and k}))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int32)
    known = [path.as_posix() for path in listing.images]
    captions, more = read_captions(root, known, [path.as_posix() for path in listing.captions])
    texts = [captions.get(path.as_posix(), "") for path in paths]
    whole = Split(images, labels)
    rows = {split: np.flatnonzero(splits == split) for split in SPLITS}
    parts = {split: whole.rows(chosen) for split, chosen in rows.items()}
    notes += listing.notes + more
    if passed:
        notes += (f"{passed} is the only folder: splits and classes are read from within it",)
    if captions:
        of_split = {split: [texts[row] for row in chosen] for split, chosen in rows.items()}
        tokens, odd = usable_captions(of_split)
        parts = {s: part._replace(captions=tokens[s]) for s, part in parts.items()}
        empty = sum(not text for text in texts)
        if empty and not odd:
            notes += (f"{empty} of {len(texts)} images have no caption: theirs is the empty one",)
        notes += odd
    loose = int((labels[keep] < 0).sum())
    if classes and loose:
        notes += (f"{loose} of {keep.sum()} images lie beside the class folders: no class",)
    trained = set(labels[splits == "train"])
    untrained = [name for name in classes if numbers[name] not in trained]
    if untrained:
        notes += (f"{len(untrained)} classes have no training images: {_shown(untrained)}",)
    if not keep.all():
        notes += (f"left out {(~keep).sum()} images outside the folders of its splits",)
    validation = parts["validation"] if len(parts["validation"].images) else None
    return Data(
        name=f"folder:{root}",
        title=f"folder {printable(root.name)}",
        train=parts["train"],
        test=parts["test"],
        validation=validation,
        levels=256,
        classes=classes,
        fingerprint=fingerprint(parts["train"], validation, parts["test"]),
        notes=tuple(printable(note) for note in notes),
    )


def _decoded(
    root: pathlib.Path, files: list[pathlib.PurePath]
) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Return the images that can be decoded, which files they are, and notes on the others."""
    images: list[np.ndarray] = []
    kept: list[int] = []
    corrupt: list[str] = []
    animated: list[str] = []
    dark = 0
    with decoding():
        for row, path in enumerate(files):
            try:
                image: Decoded = decode(root / path)
            except Exception as error:  # Pillow raises whatever its decoders raise
                corrupt.append(f"{path} ({reason_of(error)})")
                continue
            if images and image.pixels.shape[:2] != images[0].shape[:2]:
                raise UserError(
                    f"images must have one size: {root / files[kept[0]]} is {_size(images[0])}, "
                    f"{root / path} is {_size(image.pixels)}; resize them, or move the odd ones "
                    f"out of {root}"
                )
            if image.animated:
                animated.append(str(path))
            dark += image.dark
            images.append(image.pixels)
            kept.append(row)
    if not images:
        raise UserError(f"none of the {len(files)} images in {root} can be read: {_shown(corrupt)}")
    channels = max(image.shape[2] for image in images)  # grey ones among colour ones join them
    stack = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
    notes: tuple[str, ...] = ()
    if corrupt:
        notes += (f"skipped {len(corrupt)} corrupt of {len(files)} images: {_shown(corrupt)}",)
    if animated:
        notes += (
            f"{len(animated)} images have several frames, of which the first is used: "
            f"{_shown(animated)}",
        )
    if dark:
        notes += (f"{dark} of {len(files)} {DARK_NOTE}",)
    return stack, kept, notes


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
