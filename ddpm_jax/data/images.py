"""The one decoder of image files, for folders and for the records of TFDS."""

import contextlib
import io
import pathlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ddpm_jax.errors import printable

# Pillow also opens formats that start other programs (EPS) or hold no raster of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
ENDINGS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif"}
ENDINGS |= {".tif", ".tiff"}
ORIENTATION = 0x0112  # the EXIF tag
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
GREY_DEPTHS = {"L;2": 85, "L;4": 17}  # raw modes of PNG: the factor from a sample to 8 bits
DARK = 2**12 >> 8  # what a 12-bit value is less than once it was read as one of 16 bits
DARK_NOTE = (
    "images of 16 bits hold no value above 4095 and are dark: values are read as 16 bits; convert "
    "images of 12 bits or fewer"
)


class Decoded(NamedTuple):
    """An image, uint8 [H, W, 1 or 3].

    animated: it is the first of several frames.
    dark: its values have 16 bits or more, and are so small as if they had 12 bits.
    """

    pixels: np.ndarray
    animated: bool = False
    dark: bool = False


def decode(file: bytes | pathlib.Path) -> Decoded:
    """Decode an image file to 8 bits of grey or RGB, upright, with transparency laid on white.

    Grey stays grey.  16-bit values lose their lower byte.  32-bit grey is read as 16-bit values if
    it holds no larger ones, or else as values of 32 bits.

    Args:
      file: its path or its content; use it within `decoding`.

    Raises:
      ValueError: its pixels have no known range.
      Exception: whatever Pillow's decoders raise of a damaged file.
    """
    # Always the content: from a path Pillow maps some files into memory, and turns them wrongly.
    content = file if isinstance(file, bytes) else file.read_bytes()
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        raw = str(image.tile[0][3]) if image.tile else ""
        image.load()
        pixels = _upright(_pixels(image, raw), image)
        wide = image.mode in (*GREY_16, "I") or (";16" in raw and "BGR" not in raw)
        return Decoded(pixels, animated, wide and bool(pixels.max() < DARK))


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Make an image of too many pixels an error, and silence Pillow's other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def reason_of(error: Exception) -> str:
    """Return why a file could not be decoded, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too many pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split("\n")
    return printable(lines[0])[:100] or type(error).__name__


def _pixels(image: Image.Image, raw: str) -> np.ndarray:
    """Return a loaded Pillow image's pixels, as stored; `raw` is its file's raw mode."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in GREY_16 or mode == "I":
        wide = np.asarray(image).astype(np.int64)
        return _on_white(_eight_bits(wide), _alpha_of(wide, key))
    if mode == "F":
        raise ValueError("float pixels have no known range")
    if mode in ("1", "L"):
        grey = np.asarray(image if mode == "L" else image.convert("L"))
        if key is not None:  # PNG gives it as the sample that the file holds
            key = 255 * key if mode == "1" else key * GREY_DEPTHS.get(raw, 1)
        return _on_white(grey, _alpha_of(grey, key))
    if mode in ("LA", "La"):
        both = np.asarray(image.convert("LA"))
        return _on_white(both[..., 0], both[..., 1])
    if mode == "RGB" and isinstance(key, tuple):
        colour = np.asarray(image)
        wanted = np.array(key) >> 8 if raw.startswith("RGB;16") else np.array(key)
        return _on_white(colour, _alpha_of((colour == wanted).all(-1), True))
    if mode == "LAB":
        return np.asarray(_from_lab(image))
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and image.has_transparency_data):
        both = np.asarray(image.convert("RGBA"))
        return _on_white(both[..., :3], both[..., 3])
    return np.asarray(image.convert("RGB"))


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Return grey values of 8 bits from those of 16 or 32 bits (int64)."""
    grey = np.where(grey < 0, grey + 2**32, grey)  # Pillow reads 32 bits as signed ones
    return (grey >> (8 if grey.max() < 2**16 else 24)).astype(np.uint8)


def _alpha_of(values: np.ndarray, key: object) -> np.ndarray | None:
    """Return the alpha of an image; the value `key`, if it is not None, is transparent."""
    return None if key is None else np.where(values == key, 0, 255).astype(np.uint8)


def _on_white(pixels: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Lay [H, W] or [H, W, C] with alpha [H, W] on white: [H, W, C], rounded to the nearest."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if alpha is None:
        return pixels
    weight = alpha[..., None].astype(np.uint32)
    return ((pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # it would be None if the image had been changed in its place
    return converted


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turn and mirror pixels as the file's EXIF says; Pillow has turned those of TIFF already."""
    if not image.info:  # as of most small images: no EXIF either
        return pixels
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF makes no image useless
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
