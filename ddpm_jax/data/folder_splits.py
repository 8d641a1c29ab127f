"""Which folders of images are splits, and which examples are held out where none are.

A sub-folder `train`, and `validation` and `test` beside it, are the splits (`SPLIT_NAMES` has their
other names).  Where there is no `test`, `validation` is the test split; where there is neither, one
file in ten, chosen by a hash of its name, is held out for testing.  A single folder of nothing but
folders is passed: the splits and classes are those within it.
"""

import hashlib
import os
import pathlib
import re

import numpy as np

from ddpm_jax.data.split_names import SPLIT_NAMES, split_folders
from ddpm_jax.errors import UserError

HASHED = "train or test"
_SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}
_SPLIT = "(" + "|".join(sorted(_SPLIT_OF, key=len, reverse=True)) + ")"
_WORDS = r"(?:sets?|datasets?|data|images?|imgs?|pictures?|photos?|splits?|samples?|files?)"
# `train2017`, `test_set`, `valImages`: a split's name, then no other word; `train_a`, `testB`: then
# anything that is a word of its own; `images-train`: at the end.
_NAMED_AS = re.compile(rf"(?i:{_SPLIT}(?:[^a-z]|{_WORDS})*)")
_BEGINS_AS = re.compile(rf"(?i:{_SPLIT})(?:[\W\d_].*|(?<=[a-z])[A-Z].*)", re.DOTALL)
_ENDS_AS = re.compile(rf"(.*[\W\d_])(?i:{_SPLIT})", re.DOTALL)


def find_splits(
    root: pathlib.Path, paths: list[pathlib.PurePath]
) -> tuple[list[pathlib.PurePath], np.ndarray, str]:
    """Return each file's path within its split, the split's name, and the folders passed for it.

    The name is "" in none, and `HASHED` where a hash decides between training and testing.

    Raises:
      UserError: it is not clear which folders are splits.
    """
    paths, outer = _passed(paths)
    inner, splits = _named_splits(root / outer, paths)
    more = pathlib.PurePath()
    if inner != paths:  # there are splits
        inner, more = _passed(inner)
    parts = outer.parts + (("each split's", *more.parts) if more.parts else ())
    return inner, splits, "/".join(parts)


def _passed(
    paths: list[pathlib.PurePath],
) -> tuple[list[pathlib.PurePath], pathlib.PurePath]:
    """Return paths without the folders above the splits or classes, and those folders.

    A folder that is the only one, holds no images and is not a split hides those within it.
    """
    folders = pathlib.PurePath()
    while True:
        below = [path for path in paths if len(path.parts) > 1]
        tops = {path.parts[0] for path in below}
        if len(tops) != 1 or any(len(path.parts) == 2 for path in below) or split_folders(tops):
            return paths, folders
        folders /= tops.pop()
        paths = [
            pathlib.PurePath(*path.parts[1:]) if len(path.parts) > 1 else path for path in paths
        ]


def _named_splits(
    root: pathlib.Path, paths: list[pathlib.PurePath]
) -> tuple[list[pathlib.PurePath], np.ndarray]:
    """Return the first two of `find_splits`, of paths below `root`."""
    tops = [path.parts[0] if len(path.parts) > 1 else "" for path in paths]
    folders = {top for top in tops if top}
    _check_names(root, folders)
    named = split_folders(folders)
    others = sorted(folders - {name for names in named.values() for name in names})
    train, held_out = named.get("train"), named.keys() - {"train"}
    deep = any(len(p.parts) > 2 for p, top in zip(paths, tops, strict=True) if top in (train or ()))
    for split, names in named.items():
        if len(names) > 1:
            raise UserError(
                f"{root} has {len(names)} folders of the {split} split: {', '.join(names)}; keep "
                "one of them, or join them"
            )
    if held_out and not train:
        have = " and ".join(names[0] for names in named.values())
        raise UserError(
            f"{root} has {have}, but no folder train beside; move the training images "
            f"into {root / 'train'}, or rename {have} if it is a class"
        )
    if train and others and not held_out and deep:
        raise UserError(
            f"{root} has a folder {train[0]} with classes of its own beside {', '.join(others[:3])}"
            f"; name the held-out images' folder validation or test, or give {root / train[0]}"
        )
    if not train or (others and not held_out):
        _check_inner(root, paths)
        return list(paths), np.full(len(paths), HASHED, object)
    inner = [pathlib.PurePath(*p.parts[1:]) if t else p for p, t in zip(paths, tops, strict=True)]
    split_of = {names[0]: split for split, names in named.items()}
    splits = np.array([split_of.get(top, "") for top in tops], object)
    if "test" not in named and held_out:  # the only held-out images are for the final figures
        splits[splits == "validation"] = "test"
    if not held_out:
        splits[splits == "train"] = HASHED
    return inner, splits


def _check_names(root: pathlib.Path, folders: set[str]) -> None:
    """Raise UserError if folders have names like those of splits that are not read as such."""
    real = {name for names in split_folders(folders).values() for name in names}
    named, begun, ended = (
        {name: match for name in sorted(folders - real) if (match := pattern.fullmatch(name))}
        for pattern in (_NAMED_AS, _BEGINS_AS, _ENDS_AS)
    )
    like = [name for name in named if len(named) + len(real) > 1]
    splits = {_SPLIT_OF[match[1].lower()] for match in (named | begun).values()}
    if len(splits | split_folders(real).keys()) > 1:
        like += [*named, *begun]
    for name, match in ended.items():
        same = {m[2].lower() for m in ended.values() if m[1] == match[1]}
        if len({_SPLIT_OF[word] for word in same}) > 1:
            like.append(name)
    if like:
        raise UserError(
            f"the folder {root / min(like)} is called like a split and would be a class; rename "
            "the folders of splits to train, validation and test, or give it another name if it "
            "is a class"
        )


def _check_inner(root: pathlib.Path, paths: list[pathlib.PurePath]) -> None:
    """Raise UserError if a sub-folder has splits of its own, whose images would be mixed."""
    inside: dict[str, set[str]] = {}
    for path in paths:
        if len(path.parts) > 2:
            inside.setdefault(path.parts[0], set()).add(path.parts[1])
    for top, names in inside.items():
        splits = split_folders(names)
        if "train" in splits and len(splits) > 1:
            have = " and ".join(folders[0] for folders in splits.values())
            raise UserError(
                f"the splits {have} lie in {root / top}: give folder:{root / top}, or move them up "
                f"into {root}, with the classes inside them"
            )


def resolve_hashed(paths: list[pathlib.PurePath], splits: np.ndarray) -> np.ndarray:
    """Return the splits; where `HASHED`, one image in ten by a hash of its name is for testing."""
    mine = splits == HASHED
    testing = np.array([_held_out(path) for path in paths]) & mine
    if mine.sum() > 1 and (testing[mine].all() or not testing.any()):  # a handful: one for testing
        testing = np.arange(len(paths)) == np.flatnonzero(mine)[0]
    return np.where(mine, np.where(testing, "test", "train"), splits).astype(object)


def _held_out(path: pathlib.PurePath) -> bool:
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()[0] % 10 == 0
