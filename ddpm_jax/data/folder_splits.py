"""Splits of a folder of images, from the names of its sub-folders.

The sub-folders `train`, `validation` and `test` are the splits (`SPLIT_NAMES` lists all allowed
names).  If there is no `test`, `validation` is the test split.  If there is neither, one image
in ten, selected by a hash of its path, is in the test split.  If a folder contains no images and
only one sub-folder, which is not a split, the splits and classes are read from that sub-folder.
"""

import hashlib
import os
import pathlib
import re

import numpy as np

from ddpm_jax.data.split_names import SPLIT_NAMES, split_folders
from ddpm_jax.errors import UserError

HASHED = "train or test"  # a hash of the image's path selects the training or the test split
_SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}
_SPLIT = "(" + "|".join(sorted(_SPLIT_OF, key=len, reverse=True)) + ")"
_WORDS = r"(?:sets?|datasets?|data|images?|imgs?|pictures?|photos?|splits?|samples?|files?)"
# Three patterns of names that contain the name of a split: `train2017`, `test_set`, `valImages`
# (followed by digits and words for data), `train_a`, `testB` (followed by any separate word),
# `images-train` (at the end).
_NAMED_AS = re.compile(rf"(?i:{_SPLIT}(?:[^a-z]|{_WORDS})*)")
_BEGINS_AS = re.compile(rf"(?i:{_SPLIT})(?:[\W\d_].*|(?<=[a-z])[A-Z].*)", re.DOTALL)
_ENDS_AS = re.compile(rf"(.*[\W\d_])(?i:{_SPLIT})", re.DOTALL)


def find_splits(
    root: pathlib.Path, paths: list[pathlib.PurePath]
) -> tuple[list[pathlib.PurePath], np.ndarray, str]:
    """Find the split of each image from the names of the folders that contain the image.

    Args:
      root: The folder.
      paths: The paths of the images relative to `root`.

    Returns:
      A triple. First, the path of each image relative to the folder of its split. Second, the name
      of each image's split, object [N]: "" for an image that is in no split, and `HASHED` for an
      image that `resolve_hashed` assigns to the training or test split. Third, the path of the
      folders that contain only one folder each, such as "photos/SPLIT/all" where SPLIT is any
      split, or "" if there are no such folders.

    Raises:
      UserError: If the splits are ambiguous.
    """
    paths, outer = _strip_wrappers(paths)
    split_paths, splits = _named_splits(root / outer, paths)
    inner = pathlib.PurePath()
    if split_paths != paths:  # there are splits
        split_paths, inner = _strip_wrappers(split_paths)
    parts = outer.parts + (("SPLIT", *inner.parts) if inner.parts else ())
    return split_paths, splits, "/".join(parts)


def _strip_wrappers(
    paths: list[pathlib.PurePath],
) -> tuple[list[pathlib.PurePath], pathlib.PurePath]:
    """Remove the first folder of all paths while it is the only one and has no use.

    A folder has no use if it is not a split and all images are in its sub-folders. Return the
    shortened paths, and the path of the removed folders.
    """
    removed = pathlib.PurePath()
    while True:
        below = [path for path in paths if len(path.parts) > 1]
        tops = {path.parts[0] for path in below}
        if len(tops) != 1 or any(len(path.parts) == 2 for path in below) or split_folders(tops):
            return paths, removed
        removed /= tops.pop()
        paths = [
            pathlib.PurePath(*path.parts[1:]) if len(path.parts) > 1 else path for path in paths
        ]


def _named_splits(
    root: pathlib.Path, paths: list[pathlib.PurePath]
) -> tuple[list[pathlib.PurePath], np.ndarray]:
    """Return each image's path relative to its split's folder, and the name of its split."""
    tops = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    folders = {top for top in tops if top}
    _check_names(root, folders)
    named = split_folders(folders)
    others = sorted(folders - {name for names in named.values() for name in names})
    train, held_out = named.get("train"), named.keys() - {"train"}
    train_has_classes = any(
        len(path.parts) > 2 for path, top in zip(paths, tops, strict=True) if top in (train or ())
    )
    for split, names in named.items():
        if len(names) > 1:
            raise UserError(
                f"{root} has {len(names)} folders of the {split} split: {', '.join(names)}; merge "
                "them into one folder, or remove all but one"
            )
    if held_out and not train:
        splits_present = " and ".join(names[0] for names in named.values())
        raise UserError(
            f"{root} has {splits_present}, but no folder train; move the training images into "
            f"{root / 'train'}, or rename {splits_present} if it is a class"
        )
    if train and others and not held_out and train_has_classes:
        raise UserError(
            f"{root} has a folder {train[0]} with class folders and also {', '.join(others[:3])}; "
            "rename the folder of the held-out images to validation or test, or give "
            f"folder:{root / train[0]}"
        )
    if not train or (others and not held_out):
        _check_inner(root, paths)
        return list(paths), np.full(len(paths), HASHED, object)
    inner = [pathlib.PurePath(*p.parts[1:]) if t else p for p, t in zip(paths, tops, strict=True)]
    split_of = {names[0]: split for split, names in named.items()}
    splits = np.array([split_of.get(top, "") for top in tops], object)
    if "test" not in named and held_out:  # the final metrics need a test split
        splits[splits == "validation"] = "test"
    if not held_out:
        splits[splits == "train"] = HASHED
    return inner, splits


def _check_names(root: pathlib.Path, folders: set[str]) -> None:
    """Raise UserError if names are similar to those of splits, such as `train2017`, `val2017`."""
    exact = {name for names in split_folders(folders).values() for name in names}
    named, begins, ends = (
        {name: match for name in sorted(folders - exact) if (match := pattern.fullmatch(name))}
        for pattern in (_NAMED_AS, _BEGINS_AS, _ENDS_AS)
    )
    similar = [name for name in named if len(named) + len(exact) > 1]
    splits = {_SPLIT_OF[match[1].lower()] for match in (named | begins).values()}
    if len(splits | split_folders(exact).keys()) > 1:
        similar += [*named, *begins]
    for name, match in ends.items():
        words = {m[2].lower() for m in ends.values() if m[1] == match[1]}
        if len({_SPLIT_OF[word] for word in words}) > 1:
            similar.append(name)
    if similar:
        raise UserError(
            f"the folder {root / min(similar)} would be a class, but its name is like that of a "
            "split; rename it to train, validation or test if it is a split, or to another name if "
            "it is a class"
        )


def _check_inner(root: pathlib.Path, paths: list[pathlib.PurePath]) -> None:
    """Raise UserError if a class folder contains splits, because their images would be mixed."""
    folders_in: dict[str, set[str]] = {}
    for path in paths:
        if len(path.parts) > 2:
            folders_in.setdefault(path.parts[0], set()).add(path.parts[1])
    for top, names in folders_in.items():
        splits = split_folders(names)
        if "train" in splits and len(splits) > 1:
            splits_present = " and ".join(folders[0] for folders in splits.values())
            raise UserError(
                f"the splits {splits_present} are in {root / top}; give folder:{root / top}, or "
                f"move them to {root}, with the class folders inside of them"
            )


def resolve_hashed(paths: list[pathlib.PurePath], splits: np.ndarray) -> np.ndarray:
    """Return `splits` with "train", or "test" for one image in ten, instead of `HASHED`.

    Args:
      paths: The path of each image relative to the folder of its split. A hash of this path selects
        the split.
      splits: The name of each image's split, as `find_splits` returns it.
    """
    hashed = splits == HASHED
    test = np.array([_held_out(path) for path in paths]) & hashed
    if hashed.sum() > 1 and (test[hashed].all() or not test.any()):  # this occurs with few images
        test = np.arange(len(paths)) == np.flatnonzero(hashed)[0]
    return np.where(hashed, np.where(test, "test", "train"), splits).astype(object)


def _held_out(path: pathlib.PurePath) -> bool:
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()[0] % 10 == 0
