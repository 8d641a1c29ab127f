"""`folder:PATH`: the user's images in the folder PATH, with labels from sub-folders.

The names of sub-folders select the splits (see `folder_splits.py`).  The sub-folders of a split are
the classes, and an image that is in no sub-folder has no class.  All images must have the same
size.  A file that cannot be decoded, or that is neither an image nor a caption file (see
`captions.py`), is skipped, and a note reports it.

Files and folders are ignored if their names begin with a dot or if they belong to the operating
system or another program (`SKIPPED`, `SYSTEM_FILES`).  A folder is read only once, even if symbolic
links lead to it.
"""

import hashlib
import os
import pathlib
import stat
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax.data.cache import fingerprint, load_decoded
from ddpm_jax.data.captions import TABLES, is_captions, read_captions, usable_captions
from ddpm_jax.data.folder_splits import find_splits, resolve_hashed
from ddpm_jax.data.images import DARK_NOTE, ENDINGS, Decoded, decode, decoding, reason_of
from ddpm_jax.data.types import SPLITS, Data, Split
from ddpm_jax.errors import UserError, printable

VERSION = 5  # of the cached data; increase it when the same files are decoded differently
SKIPPED = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
MAX_NAMES = 5  # the number of names in a note


class Listing(NamedTuple):
    """The files in a folder and its sub-folders.

    Attributes:
      images: The paths of the images relative to the folder, sorted.
      captions: The paths of the caption files relative to the folder, sorted.
      stamp: A hash that changes when one of these files changes.
      notes: Notes for the user about images, captions and folders that cannot be read.
      others: Notes for the user about files that are neither images nor captions.
    """

    images: list[pathlib.PurePath]
    captions: list[pathlib.PurePath]
    stamp: str
    notes: tuple[str, ...]
    others: tuple[str, ...]


def load(argument: str, data_dir: str | None) -> Data:
    """Return the data set of the images in folder `argument` and its sub-folders.

    The decoded images are cached. `data_dir` is not used.

    Raises:
      UserError: If the folder does not exist or contains no images, if its splits are ambiguous, if
        the images differ in size, or if a caption file is not valid.
    """
    del data_dir
    path = os.path.expanduser(argument)
    if not argument or not os.path.isdir(path):
        raise UserError(
            f'there is no folder "{printable(argument)}"; give an existing folder as '
            "--config.data=folder:PATH"
        )
    root = pathlib.Path(path).resolve()
    listing = list_files(root)
    if not listing.images:
        endings = ", ".join(sorted(ENDINGS))
        notes = (*listing.notes, *listing.others)
        raise UserError(
            "; ".join([f"there are no images in {root} (supported endings: {endings})", *notes])
        )
    splits = find_splits(root, listing.images)
    stamp = f"{VERSION} {listing.stamp}"
    data = load_decoded(root, stamp, lambda: _decode(root, listing, *splits))
    return data._replace(notes=(*data.notes, *map(printable, listing.others)))


def list_files(root: pathlib.Path) -> Listing:
    """List the images and the caption files in a folder and its sub-folders."""
    images: list[pathlib.PurePath] = []
    captions: list[pathlib.PurePath] = []
    irregular: list[str] = []
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
                irregular.append(f"{path} ({error.strerror})")
                continue
            if not stat.S_ISREG(status.st_mode):
                irregular.append(f"{path} (not a regular file)")
                continue
            (images if image else captions).append(path)
            line = f" {status.st_size} {status.st_mtime_ns}\n"
            digest.update(os.fsencode(path) + line.encode())
    if irregular:
        notes.append(f"skipped {len(irregular)} paths that are not files: {_first_of(irregular)}")
    digest.update("\n".join(notes).encode(errors="surrogateescape"))
    return Listing(
        sorted(images, key=lambda path: path.parts),
        sorted(captions, key=lambda path: path.parts),
        digest.hexdigest(),
        tuple(notes),
        _notes_on_others(others),
    )


def _notes_on_others(paths: list[pathlib.PurePath]) -> tuple[str, ...]:
    """Return notes for the user about files that are neither images nor captions."""
    notes: tuple[str, ...] = ()
    tables = [path for path in paths if path.suffix.lower() in (".jsonl", ".csv")]
    if tables:
        notes += (
            f"skipped {len(tables)} tables, such as {tables[0]}: captions are only read from "
            f"{' and '.join(TABLES)}",
        )
    endings = Counter(
        path.suffix.lower() or "no ending"
        for path in paths
        if path not in tables and path.name.lower() not in SYSTEM_FILES
    )
    if endings:
        ordered = sorted(endings.items(), key=lambda pair: (-pair[1], pair[0]))
        counts = [f"{ending} ({count})" for ending, count in ordered]
        notes += (f"skipped {endings.total()} files with other endings: {_first_of(counts)}",)
    return notes


def _folders(root: pathlib.Path, notes: list[str]) -> Iterator[tuple[pathlib.PurePath, list[str]]]:
    """Yield (path relative to `root`, file names) of `root` and of each folder in it.

    Folders that are symbolic links come last, so that a folder inside of `root` is listed under its
    real path and not under the path of a link. Append notes for the user to `notes`.
    """
    visited: set[str] = set()
    pending = [str(root)]

    def unreadable(error: OSError) -> None:
        notes.append(f"cannot read the folder {error.filename}: {error.strerror}")

    while pending:
        for folder, folders, files in os.walk(pending.pop(0), onerror=unreadable):
            real = os.path.realpath(folder)
            if real in visited:
                notes.append(f"skipped the folder {folder}: it is {real}, which was read already")
                folders.clear()
                continue
            visited.add(real)
            subfolders = sorted(name for name in folders if not _is_skipped(name))
            for name in subfolders:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    continue
                target = os.path.realpath(path)
                if os.path.commonpath([target, real]) == target:
                    notes.append(
                        f"skipped the folder {path}: it is a link to {target}, which contains it"
                    )
                else:
                    pending.append(path)
            folders[:] = [n for n in subfolders if not os.path.islink(os.path.join(folder, n))]
            names = sorted(name for name in files if not _is_skipped(name))
            yield pathlib.PurePath(folder).relative_to(root), names


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name.lower() in SKIPPED


def _decode(
    root: pathlib.Path,
    listing: Listing,
    split_paths: list[pathlib.PurePath],
    splits: np.ndarray,
    wrapper: str,
) -> Data:
    """Decode the images of a folder and return the data set.

    `split_paths`, `splits` and `wrapper` are the three results of `find_splits`.
    """
    images, decoded, notes = _decode_images(root, listing.images)
    paths = [listing.images[row] for row in decoded]
    split_paths = [split_paths[row] for row in decoded]
    splits = resolve_hashed(split_paths, splits[decoded])
    names = [path.parts[0] if len(path.parts) > 1 else "" for path in split_paths]
    used = splits != ""
    classes = tuple(sorted({n for n, in_use in zip(names, used, strict=True) if n and in_use}))
    class_index = {name: index for index, name in enumerate(classes)}
    labels = np.array([class_index.get(name, -1) for name in names], np.int32)
    captions, caption_notes = read_captions(
        root,
        [path.as_posix() for path in listing.images],
        [path.as_posix() for path in listing.captions],
    )
    texts = [captions.get(path.as_posix(), "") for path in paths]
    rows = {split: np.flatnonzero(splits == split) for split in SPLITS}
    parts = {split: Split(images[r], labels[r]) for split, r in rows.items()}
    notes += listing.notes + caption_notes
    if wrapper:
        notes += (f"splits and classes are read from inside {wrapper}, which is the only folder",)
    if captions:
        tokens, token_notes = usable_captions({s: [texts[i] for i in r] for s, r in rows.items()})
        parts = {s: part._replace(captions=tokens[s]) for s, part in parts.items()}
        empty = sum(not text for text in texts)
        if empty and not token_notes:
            notes += (f"{empty} of {len(texts)} images have no caption; an empty caption is used",)
        notes += token_notes
    unlabelled = int((labels[used] < 0).sum())
    if classes and unlabelled:
        notes += (f"{unlabelled} of {used.sum()} images are in no class folder and have no class",)
    train_labels = set(labels[splits == "train"])
    untrained = [name for name in classes if class_index[name] not in train_labels]
    if untrained:
        notes += (f"{len(untrained)} classes have no training images: {_first_of(untrained)}",)
    if not used.all():
        notes += (f"skipped {(~used).sum()} images outside of the folders of the splits",)
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


def _decode_images(
    root: pathlib.Path, files: list[pathlib.PurePath]
) -> tuple[np.ndarray, list[int], tuple[str, ...]]:
    """Decode image files and skip those that are damaged.

    Return the images, uint8 [N, H, W, C], their N positions in `files`, and notes for the user.
    """
    images: list[np.ndarray] = []
    decoded: list[int] = []
    corrupt: list[str] = []
    animated: list[str] = []
    dark = 0
    with decoding():
        for row, path in enumerate(files):
            try:
                image: Decoded = decode(root / path)
            except Exception as error:  # the decoders of Pillow may raise any exception
                corrupt.append(f"{path} ({reason_of(error)})")
                continue
            if images and image.pixels.shape[:2] != images[0].shape[:2]:
                raise UserError(
                    f"all images must have the same size: {root / files[decoded[0]]} is "
                    f"{_size(images[0])}, {root / path} is {_size(image.pixels)} (width x height); "
                    f"resize the images, or move those of another size out of {root}"
                )
            if image.animated:
                animated.append(str(path))
            dark += image.dark
            images.append(image.pixels)
            decoded.append(row)
    if not images:
        raise UserError(
            f"none of the {len(files)} images in {root} can be read: {_first_of(corrupt)}; give a "
            "folder of valid images"
        )
    channels = max(image.shape[2] for image in images)  # convert grey images if some are RGB
    stack = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
    notes: tuple[str, ...] = ()
    if corrupt:
        notes += (f"skipped {len(corrupt)} corrupt of {len(files)} images: {_first_of(corrupt)}",)
    if animated:
        notes += (
            f"{len(animated)} images have several frames; only the first frame is used: "
            f"{_first_of(animated)}",
        )
    if dark:
        notes += (f"{dark} of {len(files)} {DARK_NOTE}",)
    return stack, decoded, notes


def _first_of(names: list[str]) -> str:
    """Return the first `MAX_NAMES` names, separated by commas."""
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _size(image: np.ndarray) -> str:
    """Return the size of an image [H, W, C] as "WIDTHxHEIGHT"."""
    return f"{image.shape[1]}x{image.shape[0]}"
