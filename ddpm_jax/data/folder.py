"""`folder:PATH`: images of the user's own, with labels from sub-folders.

Sub-folders `train`, `validation` and `test` (or a name of `SPLIT_NAMES`) are the splits if there is
`train` and one of the others.  Where there is no `test`, `validation` is the test split; where
there are no splits, one file in ten, chosen by a hash of its name, is held out for testing.  A
split's own sub-folders are its classes.  All images must have one size; a corrupt file is named,
skipped and counted.

Captions, if there are any, are in files of the same name that end in .txt, or in one file
`metadata.jsonl`, a line {"file_name": ..., "text": ...} each, of paths from where it lies.
"""

import hashlib
import json
import pathlib

import numpy as np

from ddpm_jax.data.loader import SPLITS, Data, Split, cache_dir, decoded_once, fingerprint
from ddpm_jax.errors import UserError
from ddpm_jax.tokens import fitting, tokenize

METADATA = "metadata.jsonl"
SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    "test": "test",
}
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load(argument: str, data_dir: str | None) -> Data:
    """The images below folder `argument`."""
    del data_dir
    root = pathlib.Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise UserError(f'there is no folder "{argument}"; give one as --config.data=folder:PATH')
    root = root.resolve()
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not files:
        endings = ", ".join(sorted(ENDINGS))
        raise UserError(f"there are no images in {root} (looked for {endings})")
    listing = hashlib.sha256()
    told = sorted(p for p in root.rglob("*") if p.suffix == ".txt" or p.name == METADATA)
    for path in [*files, *told]:
        stat = path.stat()
        listing.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    stamp = "3 " + listing.hexdigest()
    place = cache_dir() / "decoded" / hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return decoded_once(place, stamp, lambda: _decode(root, files))


def _decode(root: pathlib.Path, files: list[pathlib.Path]) -> Data:
    images: list[np.ndarray] = []
    kept: list[pathlib.PurePath] = []
    corrupt: list[str] = []
    for path in files:
        try:
            image = _open(path)
        except Exception as error:  # Pillow raises whatever its decoders raise
            corrupt.append(f"{path.relative_to(root)} ({type(error).__name__})")
            continue
        if images and image.shape[:2] != images[0].shape[:2]:
            raise UserError(
                f"images must have one size: {root / kept[0]} is {_size(images[0])}, "
                f"{path} is {_size(image)}; resize them, or move the odd ones out of {root}"
            )
        images.append(image)
        kept.append(path.relative_to(root))
    if not images:
        raise UserError(f"none of the {len(files)} images in {root} can be read")

    inner, splits = _splits(kept)
    keep = splits != ""
    names = [path.parts[0] if len(path.parts) > 1 else "" for path in inner]
    classes = tuple(sorted({n for n, k in zip(names, keep, strict=True) if n and k}))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(name, -1) for name in names], np.int32)
    channels = max(image.shape[2] for image in images)  # grey ones among colour ones join them
    stack = np.stack([np.broadcast_to(i, (*i.shape[:2], channels)) for i in images])
    texts = _captions(root)
    captions = None
    if texts:
        ordered = [texts.get(path, "") for path in kept]
        captions = tokenize(ordered, fitting(ordered))
    whole = Split(stack, labels, captions)
    train, validation, test = (whole.rows(np.flatnonzero(splits == name)) for name in SPLITS)
    notes: tuple[str, ...] = ()
    untold = sum(path not in texts for path in kept)
    if texts and untold:
        notes += (f"{untold} of {len(kept)} images have no caption: theirs is the empty one",)
    if corrupt:
        shown = ", ".join(corrupt[:5]) + (", ..." if len(corrupt) > 5 else "")
        notes += (f"skipped {len(corrupt)} corrupt of {len(files)} images: {shown}",)
    if not keep.all():
        notes += (f"left out {(~keep).sum()} images outside the folders of its splits",)
    return Data(
        name=f"folder:{root}",
        title=f"folder {root.name}",
        train=train,
        test=test,
        validation=validation if len(validation.images) else None,
        levels=256,
        classes=classes,
        fingerprint=fingerprint(train, validation if len(validation.images) else None, test),
        notes=notes,
    )


def _splits(paths: list[pathlib.PurePath]) -> tuple[list[pathlib.PurePath], np.ndarray]:
    """Return each file's path within its split, and the split's name; "" is in none."""
    tops = [SPLIT_NAMES.get(p.parts[0].lower(), "") if len(p.parts) > 1 else "" for p in paths]
    if "train" in tops and {"validation", "test"} & set(tops):
        if "test" not in tops:  # the only held-out images are for the final figures
            tops = ["test" if top == "validation" else top for top in tops]
        inner = [pathlib.PurePath(*path.parts[1:]) for path in paths]
        return inner, np.array(tops, object)
    testing = np.array([_held_out(path) for path in paths])
    if len(paths) > 1 and testing.all() == testing.any():  # a handful: one for testing
        testing = np.arange(len(paths)) == 0
    return list(paths), np.where(testing, "test", "train").astype(object)


def _captions(root: pathlib.Path) -> dict[pathlib.PurePath, str]:
    """Captions by an image's path from `root`.

    Raises:
      UserError: a file of them cannot be read.
    """
    found: dict[pathlib.PurePath, str] = {}
    images = {p.with_suffix(""): p for p in root.rglob("*") if p.suffix.lower() in ENDINGS}
    for path in sorted(root.rglob("*.txt")):
        if path.with_suffix("") in images:
            found[images[path.with_suffix("")].relative_to(root)] = _text(path).strip()
    for path in sorted(root.rglob(METADATA)):
        for number, line in enumerate(_text(path).splitlines(), 1):
            try:
                told = json.loads(line) if line.strip() else {}
                text = told.get("text", told.get("caption"))
                if told:
                    place = (path.parent / told["file_name"]).relative_to(root)
                    found[place] = str(text or "")
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(
                    f'{path}, line {number}: must be {{"file_name": "...", "text": "..."}}'
                ) from None
    return found


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: {error}") from None


def _open(path: pathlib.Path) -> np.ndarray:
    """uint8 [H, W, 1 or 3]; transparency is laid on white."""
    from PIL import Image

    with Image.open(path) as file:
        file.load()
        image: Image.Image = file
        if image.mode.startswith("I"):  # 16 bits of grey
            return (
                (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)[..., None]
            )
        if image.mode == "F":
            raise ValueError("float images have no known range")
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[..., None]
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
        return np.asarray(image.convert("RGB"))


def _held_out(path: pathlib.PurePath) -> bool:
    return hashlib.sha256(path.as_posix().encode()).digest()[0] % 10 == 0


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
