"""Decoding of image files, for `folder:PATH` and for TFDS data sets."""

import contextlib
import io
import pathlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ddpm_jax.errors import printable

# Pillow also opens formats that start other programs (EPS) or contain no pixels.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
ENDINGS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif"}
ENDINGS |= {".tif", ".tiff"}
ORIENTATION = 0x0112  # the EXIF tag
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
GREY_SCALES = {"L;2": 85, "L;4": 17}  # factors from 2 and 4 bits to 8 bits, by raw mode of PNG
DARK_LIMIT = 2**12 >> 8  # 8-bit limit of 12-bit values that are stored in 16 bits
DARK_NOTE = (
    "images of 16 bits have no value above 4095 and are therefore dark; if their values have 12 "
    "bits or fewer, convert the files to 8 bits"
)


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
      pixels: The pixels, uint8 [H, W, 1 or 3].
      animated: True if the file has several frames; `pixels` is the first frame.
      dark: True if the values in the file have 16 bits or more, but all of them are below 2^12.
    """

    pixels: np.ndarray
    animated: bool = False
    dark: bool = False


def decode(file: bytes | pathlib.Path) -> Decoded:
    """Decode an image file to 8-bit grey or RGB pixels.

    Call this function inside the context manager `decoding`. Pixels are rotated by the EXIF
    orientation, and transparent pixels are blended with white. A grey image has one channel. Of
    16-bit and 32-bit values, the upper 8 bits are used; 32-bit grey values are read as 16-bit
    values if all of them are below 2^16.

    Args:
      file: The path or the content of the file.

    Raises:
      ValueError: If the pixels are floats, whose range is unknown.
      Exception: If the file is damaged. Pillow's decoders may raise exceptions of any type.
    """
    # Pillow memory-maps some files that it opens by path, and then turns them wrongly.
    content = file if isinstance(file, bytes) else file.read_bytes()
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        raw = str(image.tile[0][3]) if image.tile else ""
        image.load()
        pixels = _upright(_pixels(image, raw), image)
        wide = image.mode in (*GREY_16, "I") or (";16" in raw and "BGR" not in raw)
        return Decoded(pixels, animated, wide and bool(pixels.max() < DARK_LIMIT))


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Raise Pillow's warning of too many pixels as an error, and ignore its other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def reason_of(error: Exception) -> str:
    """Return a few words that explain the error of `decode`, such as "too many pixels"."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too many pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split("\n")
    return printable(lines[0])[:100] or type(error).__name__


def _pixels(image: Image.Image, raw: str) -> np.ndarray:
    """Return the pixels of an image, blended with white and not yet rotated, [H, W, 1 or 3].

    Args:
      image: The loaded image.
      raw: Pillow's raw mode, the name of the pixel format in the file, such as "RGB;16B".
    """
    mode, key = image.mode, image.info.get("transparency")
    if mode in GREY_16 or mode == "I":
        wide = np.asarray(image).astype(np.int64)
        return _on_white(_eight_bits(wide), _alpha_of(wide, key))
    if mode == "F":
        raise ValueError("the range of float pixels is unknown; convert the file to 8 bits")
    if mode in ("1", "L"):
        grey = np.asarray(image if mode == "L" else image.convert("L"))
        if key is not None:  # PNG stores the key in the bit depth of the file
            key = 255 * key if mode == "1" else key * GREY_SCALES.get(raw, 1)
        return _on_white(grey, _alpha_of(grey, key))
    if mode in ("LA", "La"):
        grey_alpha = np.asarray(image.convert("LA"))
        return _on_white(grey_alpha[..., 0], grey_alpha[..., 1])
    if mode == "RGB" and isinstance(key, tuple):
        rgb = np.asarray(image)
        transparent = np.array(key) >> 8 if raw.startswith("RGB;16") else np.array(key)
        return _on_white(rgb, _alpha_of((rgb == transparent).all(-1), True))
    if mode == "LAB":
        return np.asarray(_from_lab(image))
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and image.has_transparency_data):
        rgba = np.asarray(image.convert("RGBA"))
        return _on_white(rgba[..., :3], rgba[..., 3])
    return np.asarray(image.convert("RGB"))


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Convert grey values of 16 or 32 bits, int64 [H, W], to uint8 [H, W]."""
    grey = np.where(grey < 0, grey + 2**32, grey)  # Pillow reads 32-bit values as signed integers
    return (grey >> (8 if grey.max() < 2**16 else 24)).astype(np.uint8)


def _alpha_of(values: np.ndarray, key: object) -> np.ndarray | None:
    """Return the opacity [H, W]: 0 where a value equals `key`, and 255 at all other pixels.

    Return None if `key`, the value of transparent pixels, is None.
    """
    return None if key is None else np.where(values == key, 0, 255).astype(np.uint8)


def _on_white(pixels: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Blend pixels, [H, W] or [H, W, C], with white by their opacity alpha, uint8 [H, W].

    Return the rounded values, uint8 [H, W, C]. If `alpha` is None, the values do not change.
    """
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if alpha is None:
        return pixels
    weight = alpha[..., None].astype(np.uint32)
    return ((pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _from_lab(image: Image.Image) -> Image.Image:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # None is only returned with inPlace=True
    return converted


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Rotate and mirror pixels [H, W, C] by the EXIF orientation of `image`."""
    if not image.info:  # without metadata there is no EXIF; Pillow itself has rotated TIFF images
        return pixels
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # an image with damaged EXIF is used as it is
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
