"""Captions of `folder:PATH`, from `.txt` files, `metadata.jsonl` and `metadata.csv`.

The file `a.txt` contains the caption of `a.png`, `a.jpg` and so on in the same directory, and
`a.png.txt` contains the caption of `a.png` only.  A line of `metadata.jsonl`,
{"file_name": ..., "text": ...}, or a row of `metadata.csv` contains the caption of the image at
`file_name`, a path relative to the directory of the metadata file.  The key of the caption is
`text`, `caption` or `prompt`.

If an image has several captions, a caption of a metadata file has priority over a caption of a
`.txt` file, `a.png.txt` has priority over `a.txt`, and otherwise the first caption is used.  File
names are compared after Unicode normalization (NFC).
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

from ddpm_jax.data.tokenizer import padded_length, tokenize
from ddpm_jax.errors import UserError
from ddpm_jax.fields import Json

KEYS = ("text", "caption", "prompt")
FILE = "file_name"
TABLES = ("metadata.jsonl", "metadata.csv")


def is_captions(name: str) -> bool:
    """Return whether `name` is the name of a caption file: `.txt` or one of `TABLES`."""
    return name.lower().endswith(".txt") or name.lower() in TABLES


def read_text(path: pathlib.Path) -> str:
    """Return the content of a UTF-8 text file without its byte-order mark.

    Raises:
      OSError: If the file cannot be read or is not a regular file.
      UnicodeError: If the file is not UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe would block
        raise OSError(0, "it is not a regular file")
    return path.read_bytes().decode("utf-8-sig")


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text. Only "\n" and "\r\n" end a line, unlike in `splitlines`."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_captions(
    root: pathlib.Path, images: Iterable[str], files: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Read the captions of the images in a folder.

    Args:
      root: The folder.
      images: The paths of the images, relative to `root`, with "/" between directories.
      files: The paths of the caption files, relative to `root`, with "/" between directories.

    Returns:
      A dict from the path of an image to its caption, and notes for the user about captions that
      are not used.

    Raises:
      UserError: If a file cannot be read or has an invalid line, or if no image that is listed in
        a metadata file exists.
    """
    image_names = _Names(images)
    tables = [file for file in files if posixpath.basename(file).lower() in TABLES]
    captions: dict[str, str] = {}
    duplicates = 0
    missing: list[str] = []
    for file in tables:
        matched, missing_before = 0, len(missing)
        for line, name, text in _rows(root, file):
            image = _image(root, file, line, name, image_names)
            if image is None:
                missing.append(f"{file} {line}: {name}")
                continue
            matched += 1
            duplicates += image in captions
            captions.setdefault(image, text)
        if len(missing) > missing_before and not matched:
            raise UserError(
                f"{root / file} names no image of the folder ({missing[-1]} does not exist); "
                f"{FILE} must be the path of an image relative to the directory of this file"
            )
    text_files = [file for file in files if file not in tables]
    of_text_files, unused, unused_captions = _text_captions(root, image_names, text_files)
    duplicates += unused_captions + sum(image in captions for image in of_text_files)
    captions = {**of_text_files, **captions}
    notes = []
    if duplicates:
        notes.append(
            f"{duplicates} captions are not used, because their images have another caption"
        )
    if missing:
        notes.append(f"{len(missing)} captions name images that do not exist ({missing[0]})")
    if unused:
        notes.append(f"{len(unused)} .txt files have no image of the same name ({unused[0]})")
    return {image: text.strip() for image, text in captions.items()}, tuple(notes)


class _Names:
    """Paths of images; `find` compares exact paths first, then their normal form NFC."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(paths)
        self._exact = set(self.paths)
        self._composed = {_composed(path): path for path in reversed(self.paths)}

    def find(self, path: str) -> str | None:
        """Return the spelling of `path` in the file system, or None if there is no such image."""
        return path if path in self._exact else self._composed.get(_composed(path))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _text_captions(
    root: pathlib.Path, images: _Names, files: Iterable[str]
) -> tuple[dict[str, str], list[str], int]:
    """Read the captions of the `.txt` files `files`.

    Return a dict from the path of an image to its caption, the files that belong to no image, and
    the number of captions that are not used because an image has several captions.
    """
    stems: dict[str, list[str]] = {}
    composed: dict[str, list[str]] = {}
    for image in images.paths:
        stem = posixpath.splitext(image)[0]
        stems.setdefault(stem, []).append(image)
        composed.setdefault(_composed(stem), []).append(image)
    captions: dict[str, str] = {}
    by_name: list[tuple[str, list[str]]] = []  # a.png.txt
    by_stem: list[tuple[str, list[str]]] = []  # a.txt
    unused: list[str] = []
    for file in sorted(files):
        name = posixpath.splitext(file)[0]
        image_of_name = images.find(name)
        images_of_stem = stems.get(name) or composed.get(_composed(name), [])
        if image_of_name is not None:
            by_name.append((file, [image_of_name]))
        elif images_of_stem:
            by_stem.append((file, images_of_stem))
        else:
            unused.append(file)
    unused_captions = 0
    for file, file_images in by_name + by_stem:
        free = [image for image in file_images if image not in captions]
        unused_captions += len(file_images) - len(free)
        if free:
            captions |= dict.fromkeys(free, _text(root / file))
    return captions, unused, unused_captions


def _rows(root: pathlib.Path, file: str) -> Iterator[tuple[str, str, str]]:
    """Yield ("line NUMBER", path of the image, caption) for each row of a metadata file."""
    path = root / file
    text = _text(path)
    rows: Iterator[tuple[int, Mapping[str, Json]]] = (
        _csv_rows(path, text) if file.lower().endswith(".csv") else _json_rows(path, text)
    )
    for number, row in rows:
        line = f"line {number}"
        key = next((key for key in KEYS if row.get(key)), None)
        key = key or next((key for key in KEYS if key in row), None)
        if key is None or FILE not in row:
            keys = ", ".join(str(key) for key in row) or "no keys"
            raise UserError(
                f"{path}, {line}: the row must have {FILE} and one of {', '.join(KEYS)}, but it "
                f"has {keys}; add the missing key"
            )
        caption = row[key]
        if isinstance(caption, list) and caption:
            caption = caption[0]
        for name, value in ((FILE, row[FILE]), (key, caption)):
            if not isinstance(value, str):
                raise UserError(
                    f"{path}, {line}: {name} must be a string, not {json.dumps(value)[:60]}; "
                    "correct this line"
                )
        yield line, row[FILE], caption


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
                f"{path}, line {number}: every line must be a JSON object such as "
                f'{{"{FILE}": "...", "{KEYS[0]}": "..."}}'
            )
        yield number, row


def _csv_rows(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if len(set(names)) < len(names):
            raise UserError(
                f"{path}, line 1: two columns have the same name: {', '.join(names)}; "
                "rename one of them"
            )
        for row in reader:
            if None in row:
                cells = len(names) + len(row[None])
                raise UserError(
                    f"{path}, line {reader.line_num}: the row has {cells} cells, but the "
                    f"header has {len(names)}; put captions that contain commas in quotes"
                )
            yield (
                reader.line_num,
                {key.strip(): value for key, value in row.items() if isinstance(key, str)},
            )
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; correct it to valid CSV"
        ) from None


def _image(root: pathlib.Path, file: str, line: str, name: str, images: _Names) -> str | None:
    """Return the path of an image relative to `root`, or None if the image does not exist.

    `name` is the path of the image relative to the directory of the metadata file `file`. It occurs
    in `line`, such as "line 3".

    Raises:
      UserError: If `name` is a path outside of `root`.
    """
    folder = posixpath.dirname(file)
    for path in dict.fromkeys((name, name.replace("\\", "/"))):
        image = posixpath.normpath(posixpath.join(folder, path))
        match = images.find(image)
        if match is not None:
            return match
        if image.startswith(("/", "../")) or image == "..":
            raise UserError(
                f"{root / file}, {line}: {FILE} {json.dumps(name)[:80]} is outside of {root}; it "
                "must be the path of an image relative to the directory of this file"
            )
    return None


def _text(path: pathlib.Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); make it readable, or remove it"
        ) from None
    except UnicodeError as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({error}); convert it to UTF-8"
        ) from None


def usable_captions(
    texts: dict[str, list[str]],
) -> tuple[dict[str, np.ndarray | None], tuple[str, ...]]:
    """Tokenize the captions of all splits, with the same number of tokens for every caption.

    Args:
      texts: A dict from the name of a split to the captions of its N images.

    Returns:
      A dict from the name of a split to its tokens, uint8 [N, length], and notes for the user. If
      all training captions are empty, the dict contains None for every split.
    """
    if not any(text.strip() for text in texts["train"]):
        note = "all captions of the training images are empty; the data are used without captions"
        return dict.fromkeys(texts, None), (note,)
    length = max(map(padded_length, texts.values()))
    same = len(set(texts["train"])) == 1 < len(texts["train"])
    notes = ("all training images have the same caption",) if same else ()
    return {split: tokenize(captions, length) for split, captions in texts.items()}, notes
