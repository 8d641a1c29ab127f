"""The decoder of image files, alone, for folders and for TFDS."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ddpm_jax.data import loader
from ddpm_jax.data.images import decode, decoding, reason_of
from helpers.data_sets import encoded, pixels, png, store, write

SIDE = 8
RGB = pixels(1, (SIDE, SIDE))
GREY = pixels(2, (SIDE, SIDE), 1)[..., 0]
ALPHA = pixels(3, (SIDE, SIDE), 1)[..., 0]
WIDE = np.random.default_rng(4).integers(0, 2**16, (SIDE, SIDE)).astype(np.uint16)


def on_white(values, alpha):
    alpha = alpha.astype(float) / 255
    alpha = alpha if values.ndim == 2 else alpha[..., None]
    exact = values * alpha + 255 * (1 - alpha)
    return np.floor(exact + 0.5)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(samples, depth, colour, transparent=None):
    """Return a PNG of packed rows with a transparent value, which Pillow cannot write."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    parts = [chunk(b"IHDR", head)]
    if transparent is not None:
        parts.append(chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in transparent)))
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed(values, depth):
    """Return rows of values packed to `depth` (1, 2 or 4) bits."""
    bits = np.unpackbits(values[..., None].astype(np.uint8), axis=2)[..., 8 - depth :]
    return np.packbits(bits.reshape(SIDE, -1), axis=1)


def palette():
    image = Image.fromarray(RGB).quantize(16)
    return image, np.asarray(image.convert("RGB"))


def keyed_palette():
    image, colours = palette()
    alpha = np.where(np.asarray(image) == 3, 0, 255)
    return encoded(image, transparency=3), on_white(colours, alpha)


def half_palette():
    """Return an image whose palette colours are all half transparent, and its pixels on white."""
    image, colours = palette()
    return encoded(image, transparency=bytes([100] * 16)), on_white(
        colours, np.full((SIDE, SIDE), 100)
    )


def keyed_grey(depth, factor, key):
    values = np.random.default_rng(depth).integers(0, 2**depth, (SIDE, SIDE))
    grey = on_white(values * factor, np.where(values == key, 0, 255))
    return raw_png(packed(values, depth), depth, 0, (key,)), grey


def keyed_colours(deep):
    values = RGB.astype(">u2") * 257 if deep else RGB
    key = tuple(int(value) for value in values[2, 3])
    expected = on_white(RGB, np.where((RGB[2, 3] == RGB).all(-1), 0, 255))
    return raw_png(values.astype(">u2" if deep else "u1"), 16 if deep else 8, 2, key), expected


def cmyk(kind, **options):
    image = Image.fromarray(np.full((SIDE, SIDE, 3), (200, 30, 90), np.uint8)).convert("CMYK")
    return encoded(image, kind, **options), np.full((SIDE, SIDE, 3), (200, 30, 90))


def lab():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(RGB // 2 + 60), *profiles, outputMode="LAB")
    return encoded(image, "TIFF"), RGB // 2 + 60


def with_alpha(values):
    both = np.concatenate([values.reshape(SIDE, SIDE, -1), ALPHA[..., None]], 2)
    return encoded(Image.fromarray(both)), on_white(values, ALPHA)


def deep_grey(scale, dtype, kind, **options):
    image = Image.fromarray((WIDE.astype(np.int64) * scale).astype(dtype))
    return encoded(image, kind, **options), WIDE >> 8


KINDS = {
    "colour": lambda: (encoded(Image.fromarray(RGB)), RGB),
    "grey": lambda: (encoded(Image.fromarray(GREY)), GREY),
    "1 bit": lambda: (encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0)),
    "palette": lambda: (encoded(palette()[0]), palette()[1]),
    "palette of a GIF": lambda: (encoded(palette()[0], "GIF"), palette()[1]),
    "palette with a transparent colour": keyed_palette,
    "palette with alpha": half_palette,
    "alpha": lambda: with_alpha(RGB),
    "grey with alpha": lambda: with_alpha(GREY),
    "colour, one transparent": lambda: keyed_colours(False),
    "16-bit colour, one transparent": lambda: keyed_colours(True),
    "grey, one transparent": lambda: keyed_grey(8, 1, 7),
    "1 bit, white transparent": lambda: keyed_grey(1, 255, 1),
    "1 bit, black transparent": lambda: keyed_grey(1, 255, 0),
    "2 bits, one transparent": lambda: keyed_grey(2, 85, 2),
    "4 bits, one transparent": lambda: keyed_grey(4, 17, 5),
    "16-bit grey": lambda: deep_grey(1, np.uint16, "PNG"),
    "16-bit grey TIFF": lambda: deep_grey(1, np.uint16, "TIFF"),
    "16-bit grey, big endian": lambda: (
        encoded(Image.frombytes("I;16B", (SIDE, SIDE), WIDE.astype(">u2").tobytes()), "TIFF"),
        WIDE >> 8,
    ),
    "16-bit grey, one transparent": lambda: (
        raw_png(WIDE.astype(">u2"), 16, 0, (int(WIDE[1, 1]),)),
        on_white(WIDE >> 8, np.where(WIDE[1, 1] == WIDE, 0, 255)),
    ),
    "32-bit grey of 16-bit values": lambda: deep_grey(1, np.int32, "TIFF"),
    "32-bit grey": lambda: deep_grey(2**16, np.uint32, "TIFF"),
    "CMYK TIFF": lambda: cmyk("TIFF"),
    "CMYK JPEG": lambda: cmyk("JPEG", quality=100),
    "LAB": lab,
    "YCbCr": lambda: (
        encoded(Image.fromarray(RGB // 8 * 8).convert("YCbCr"), "TIFF"), RGB // 8 * 8,
    ),
}  # fmt: skip
LOSSY = {"CMYK JPEG": 3, "LAB": 6, "YCbCr": 4}  # the largest error


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_file_kind_equal_those_in_an_image_viewer(kind):
    content, expected = KINDS[kind]()
    with decoding():
        actual = decode(content).pixels
    assert actual.dtype == np.uint8
    assert actual.ndim == 3
    expected = np.broadcast_to(expected.reshape(SIDE, SIDE, -1), actual.shape)
    grey = kind.startswith(("grey", "1 bit", "2", "4", "16-bit grey", "32"))
    assert actual.shape[2] == (1 if grey else 3)
    assert np.abs(actual.astype(int) - expected).max() <= LOSSY.get(kind, 0)


def test_folders_and_tfds_give_the_same_pixels(tmp_path):
    contents = [make()[0] for make in KINDS.values()]
    for number, content in enumerate(contents):
        write(tmp_path / "images" / f"{number:02d}.png", content)
    store(tmp_path, lambda f: {}, {"train": [{"image": content} for content in contents]})
    folder = loader.load(f"folder:{tmp_path / 'images'}", validation=0)
    same = loader.load("strange", str(tmp_path), 0)
    both = []
    for data in (folder, same):
        assert not [note for note in data.notes if "skipped" in note]
        rows = np.concatenate([data.train.images, data.test.images]).reshape(len(contents), -1)
        both.append(sorted(map(bytes, rows)))
    assert both[0] == both[1]
    for (content, _), kind in zip((make() for make in KINDS.values()), KINDS, strict=True):
        with decoding():
            actual = np.broadcast_to(decode(content).pixels, (SIDE, SIDE, 3))
        assert actual.tobytes() in both[0], kind


def deep(values, kind):
    if kind == "colour":
        return raw_png(np.repeat(values[..., None], 3, 2).astype(">u2"), 16, 2)
    if kind == "32 bits":
        return encoded(Image.fromarray(values.astype(np.int32)), "TIFF")
    return encoded(Image.fromarray(values), kind)


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "colour", "32 bits"])
def test_one_note_reports_16_bit_images_with_12_bit_values(kind, tmp_path):
    for number in range(6):
        content = deep(WIDE >> 4 if number % 2 else WIDE, kind)
        assert decode(content).dark == bool(number % 2)
        write(tmp_path / "images" / f"{number}.png", content)
    data = loader.load(f"folder:{tmp_path / 'images'}", validation=0)
    (dark_note,) = [note for note in data.notes if "dark" in note]
    assert dark_note.startswith(
        "3 of 6 images of 16 bits have no value above 4095 and are therefore dark"
    )
    store(tmp_path, lambda f: {}, {"train": [{"image": deep(WIDE >> 4, kind)}] * 20})
    data = loader.load("strange", str(tmp_path), 0)
    assert len([note for note in data.notes if "train images of 16 bits have" in note]) == 1


def test_dark_images_of_8_bits_are_not_reported():
    for image in (Image.fromarray(GREY // 32), Image.fromarray(RGB // 32)):
        for kind in ("PNG", "TIFF", "BMP"):
            assert not decode(encoded(image, kind)).dark


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_rotation_is_applied(kind, orientation):
    upright = np.kron(pixels(5, (2, 3)), np.ones((8, 8, 1), np.uint8))  # survives JPEG
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    options = (
        {"lossless": True}
        if kind == "WEBP"
        else {"quality": 100, "subsampling": 0}
        if kind == "JPEG"
        else {}
    )
    actual = decode(encoded(stored, kind, exif=exif, **options)).pixels
    assert actual.shape == upright.shape
    limit = 5 if kind == "JPEG" else 0
    assert np.abs(actual.astype(int) - upright).max() <= limit


@pytest.mark.parametrize("orientation", [5, 6, 8])
def test_a_file_is_rotated_like_its_content(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(RGB[..., 0]), "TIFF", exif=exif)
    (tmp_path / "a.tif").write_bytes(content)
    actual = decode(tmp_path / "a.tif").pixels
    assert actual.shape[:2] == RGB.shape[1::-1]
    assert np.array_equal(actual, decode(content).pixels)


def test_an_image_with_damaged_exif_is_decoded():
    content = encoded(Image.fromarray(RGB), exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\0\1")
    assert np.array_equal(decode(content).pixels, RGB)
    assert np.array_equal(decode(encoded(Image.fromarray(RGB), exif=b"no EXIF")).pixels, RGB)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_used_and_a_note_reports_it(kind, tmp_path):
    frames = [Image.fromarray(np.full((SIDE, SIDE, 3), v, np.uint8)) for v in (10, 200)]
    content = encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    image = decode(content)
    assert image.animated
    assert (np.abs(image.pixels.astype(int) - 10) <= 1).all()
    assert not decode(encoded(frames[0], kind)).animated
    ending = {"PNG": "png", "TIFF": "tif"}.get(kind, kind.lower())
    for number in range(3):
        write(tmp_path / "images" / f"{number}.{ending}", content)
    write(tmp_path / "images" / "single.png", png())
    data = loader.load(f"folder:{tmp_path / 'images'}", validation=0)
    assert any(note.startswith("3 images have several frames") for note in data.notes)


def huge():
    """Return the start of a PNG of 40,000 x 40,000 pixels."""
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


def large():
    """Return the start of a PNG with a few more pixels than Pillow reads without a warning."""
    head = struct.pack(">IIBBBBB", 10_000, 9_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999))


def postscript():
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "EPS")
    return file.getvalue()


UNREADABLE = {
    "empty": (lambda: b"", "not an image"),
    "truncated": (lambda: png()[:-60], "truncated|broken"),
    "a page of HTML": (lambda: b"<!DOCTYPE html><html>404</html>", "not an image"),
    "too many pixels": (huge, "too many pixels"),
    "many pixels": (large, "too many pixels"),
    "float": (
        lambda: encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "range of float pixels is unknown",
    ),
    "a program's input": (postscript, "not an image"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_file_is_skipped_and_reported_with_a_reason(kind, tmp_path, recwarn):
    make, reason = UNREADABLE[kind]
    with decoding(), pytest.raises(Exception) as raised:  # noqa: PT011
        decode(make())
    assert re.search(reason, reason_of(raised.value))
    for number in range(4):
        write(tmp_path / "images" / f"{number}.png", png(number))
    write(tmp_path / "images" / "bad.png", make())
    data = loader.load(f"folder:{tmp_path / 'images'}", validation=0)
    (note,) = [note for note in data.notes if "skipped 1 corrupt of 5" in note]
    assert "bad.png (" in note
    assert reason_of(raised.value)[:20] in note
    assert not recwarn.list


def test_tfds_records_that_cannot_be_decoded_are_skipped_with_their_reason(tmp_path):
    contents = [png(0), b"", *(png(i) for i in range(1, 5)), png()[:-60]]
    store(
        tmp_path,
        lambda f: {"label": f.ClassLabel(num_classes=9)},
        {"train": [{"image": c, "label": i} for i, c in enumerate(contents)],
         "test": [{"image": png(9), "label": 1}]},
    )  # fmt: skip
    data = loader.load("strange", str(tmp_path), 0)
    assert len(data.train.images) == 5
    order = {pixels(i).tobytes(): label for i, label in zip(range(5), (0, 2, 3, 4, 5), strict=True)}
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert order[image.tobytes()] == label
    assert any("skipped 2 corrupt of 7 train images: number " in note for note in data.notes)
