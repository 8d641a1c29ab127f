"""Captions of a folder's images: `.txt` files, `metadata.jsonl` and `metadata.csv`.

`a.txt` (or `a.png.txt`) holds the caption of every image `a` beside it.  A line of
`metadata.jsonl`, {"file_name": ..., "text": ...}, or a row of `metadata.csv` names an image by its
path from where the file lies; the caption's key is `text`, `caption` or `prompt`.  Of several
captions of an image the first is used, and one of metadata before one of a `.txt` file, of which
`a.png.txt` goes before `a.txt`.  Names match in either Unicode form, composed or decomposed.
"""

import csv
import io
import json
import pathlib
import posixpath
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ddpm_jax.data.tokenizer import fitting, tokenize
from ddpm_jax.errors import UserError
from ddpm_jax.fields import Json

KEYS = ("text", "caption", "prompt")
FILE = "file_name"
TABLES = ("metadata.jsonl", "metadata.csv")


def is_captions(name: str) -> bool:
    """Return whether a file of this name may hold captions."""
    return name.lower().endswith(".txt") or name.lower() in TABLES


def read_text(path: pathlib.Path) -> str:
    """Read a text file in UTF-8, without its byte-order mark; lines end at "\\n" only.

    Raises:
      OSError: it cannot be read; a pipe or a device is not waited for.
      UnicodeError: it is not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "it is not a regular file")
    return path.read_bytes().decode("utf-8-sig")


def lines_of(text: str) -> list[str]:
    """Return the lines of a text: other separators than "\\n" and "\\r\\n" belong to a line."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_captions(
    root: pathlib.Path, images: Iterable[str], files: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read the captions of a folder's images.

    Args:
      root: the folder.
      images: the paths of its images, from `root`, with "/" between the parts.
      files: the paths of its files of captions, likewise.

    Returns:
      The captions by an image's path, and notes about what was not used.

    Raises:
      UserError: a file cannot be read, a line of it is not as it must be, or none of the images
        that a file names exists.
    """
    known = _Names(images)
    tables = [file for file in files if posixpath.basename(file).lower() in TABLES]
    captions: dict[str, str] = {}
    further = 0
    missing: list[str] = []
    for file in tables:
        matched, lost = 0, len(missing)
        for place, name, text in _rows(root, file):
            image = _image(root, file, place, name, known)
            if image is None:
                missing.append(f"{file} {place}: {name}")
                continue
            matched += 1
            further += image in captions
            captions.setdefault(image, text)
        if len(missing) > lost and not matched:
            raise UserError(
                f"{root / file} names no image of the folder (such as {missing[-1]}); {FILE} must "
                "be an image's path from where this file lies"
            )
    beside, unused, more = _beside(root, known, [file for file in files if file not in tables])
    further += more + sum(image in captions for image in beside)
    captions = {**beside, **captions}
    notes = []
    if further:
        notes.append(f"{further} further captions of images that have one are not used")
    if missing:
        notes.append(f"{len(missing)} captions are of no image that is there ({missing[0]})")
    if unused:
        notes.append(f"{len(unused)} .txt files belong to no image ({unused[0]})")
    return {image: text.strip() for image, text in captions.items()}, tuple(notes)


class _Names:
    """Paths of images, found in either Unicode form, an exact match first."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(paths)
        self._own = set(self.paths)
        self._composed = {_composed(path): path for path in reversed(self.paths)}

    def find(self, path: str) -> str | None:
        """Return the image of this path; None if there is no such image."""
        return path if path in self._own else self._composed.get(_composed(path))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _beside(
    root: pathlib.Path, images: _Names, files: Iterable[str]
) -> tuple[dict[str, str], list[str], int]:
    """Return captions of `.txt` files by image, the files of no image, and how many are unused."""
    stems: dict[str, list[str]] = {}
    composed: dict[str, list[str]] = {}
    for image in images.paths:
        stem = posixpath.splitext(image)[0]
        stems.setdefault(stem, []).append(image)
        composed.setdefault(_composed(stem), []).append(image)
    captions: dict[str, str] = {}
    named: list[tuple[str, list[str]]] = []
    others: list[tuple[str, list[str]]] = []
    unused: list[str] = []
    for file in sorted(files):
        name = posixpath.splitext(file)[0]
        whole = images.find(name)
        owners = stems.get(name) or composed.get(_composed(name), [])
        if whole is not None:
            named.append((file, [whole]))
        elif owners:
            others.append((file, owners))
        else:
            unused.append(file)
    further = 0
    for file, owners in named + others:
        free = [image for image in owners if image not in captions]
        further += len(owners) - len(free)
        if free:
            captions |= dict.fromkeys(free, _text(root / file))
    return captions, unused, further


def _rows(root: pathlib.Path, file: str) -> Iterator[tuple[str, str, str]]:
    """Yield (line, file name, caption) of each row of a table."""
    path = root / file
    text = _text(path)
    rows: Iterator[tuple[int, Mapping[str, Json]]] = (
        _csv_rows(path, text) if file.lower().endswith(".csv") else _json_rows(path, text)
    )
    for number, row in rows:
        place = f"line {number}"
        key = next((key for key in KEYS if row.get(key)), None)
        key = key or next((key for key in KEYS if key in row), None)
        if key is None or FILE not in row:
            keys = ", ".join(str(key) for key in row) or "nothing"
            raise UserError(
                f"{path}, {place}: must have {FILE} and one of {', '.join(KEYS)}; it has {keys}"
            )
        caption = row[key]
        if isinstance(caption, list) and caption:
            caption = caption[0]
        for name, value in ((FILE, row[FILE]), (key, caption)):
            if not isinstance(value, str):
                raise UserError(
                    f"{path}, {place}: {name} must be a text, not {json.dumps(value)[:60]}"
                )
        yield place, row[FILE], caption


def _json_rows(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, Json]]]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, line {number}: must be {{"{FILE}": "...", "{KEYS[0]}": "..."}}'
            )
        yield number, row


def _csv_rows(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if len(set(names)) < len(names):
            raise UserError(f"{path}, line 1: two columns have one name: {', '.join(names)}")
        for row in reader:
            if None in row:
                cells = len(names) + len(row[None])
                raise UserError(
                    f"{path}, line {reader.line_num}: has {cells} cells, and the header "
                    f"{len(names)}; put captions that hold commas in quotes"
                )
            yield (
                reader.line_num,
                {key.strip(): value for key, value in row.items() if isinstance(key, str)},
            )
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _image(root: pathlib.Path, file: str, place: str, name: str, known: _Names) -> str | None:
    """Return the image that a table names, from `root`; None if there is no such image."""
    folder = posixpath.dirname(file)
    for path in dict.fromkeys((name, name.replace("\\", "/"))):
        image = posixpath.normpath(posixpath.join(folder, path))
        match = known.find(image)
        if match is not None:
            return match
        if image.startswith(("/", "../")) or image == "..":
            raise UserError(
                f"{root / file}, {place}: {FILE} {json.dumps(name)[:80]} leads out of {root}; it "
                "must be an image's path from where this file lies"
            )
    return None


def _text(path: pathlib.Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeError as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: {error}") from None


def usable_captions(
    texts: dict[str, list[str]],
) -> tuple[dict[str, np.ndarray | None], tuple[str, ...]]:
    """Return captions of each split as tokens, all of one length, and notes about them.

    Args:
      texts: by split.

    Returns:
      Tokens by split, or None for each where no training image has a caption.
    """
    if not any(text.strip() for text in texts["train"]):
        note = "all captions of the training images are empty: it counts as a set without captions"
        return dict.fromkeys(texts, None), (note,)
    needed = max(map(fitting, texts.values()))
    same = len(set(texts["train"])) == 1 < len(texts["train"])
    notes = ("all training images have the same caption",) if same else ()
    return {split: tokenize(captions, needed) for split, captions in texts.items()}, notes
