"""Whether an image shows what a caption of `shapes` says, read back from its pixels.

An exact judge: it knows how the set is drawn (`ddpm_jax/data/shapes.py`), and nothing is trained.
Connected parts that are not of the background's colour are shapes; each is of the kind whose
drawing, of the same area and centre of mass, covers the same pixels best.
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NUMBERS,
    OVERSAMPLE,
    RELATIONS,
    Group,
    Shape,
    draw_shape,
    related,
)

APART = 60.0  # of 255: how far from the background's a shape's colour is
FAR = 80.0  # of 255: how far a shape's colour may be from the one that it is called after
FIT = 0.1  # squared error of what a shape covers, of the kind it is called after, over its area
AREA = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # over the width's square
CENTRE = {"circle": 1 / 2, "square": 1 / 2, "triangle": 2 / 3}  # of mass, from the top, over width
UNCLEAR = "unclear"
LEAST = 12.0  # pixels of 32 x 32 that a shape covers, at the least
STRAY = 4.0  # pixels of 32 x 32 from which on a smaller part is something else in the picture
BETWEEN = 9.75  # pixels of 32: where small is parted from large


class Verdict(NamedTuple):
    """What of a caption an image shows; None: the caption does not say.

    clear: nothing is in the picture besides the shapes.
    """

    number: bool
    colours: bool
    kinds: bool
    relation: bool | None
    sizes: bool | None
    background: bool | None
    clear: bool

    @property
    def aligned(self) -> bool:
        """The image shows everything that the caption says, and nothing else."""
        said = self.sizes is not False and self.background is not False
        return self.aligned_except_size_and_background and said and self.clear

    @property
    def aligned_except_size_and_background(self) -> bool:
        """Number, colours, kinds and relation are as the caption says; parts of fewer than 12
        pixels of 32 x 32 do not count as shapes."""
        return self.number and self.colours and self.kinds and self.relation is not False


def parse(caption: str) -> tuple[tuple[Group, ...], str | None, str | None]:
    """Return the (groups, relation, background) that a caption of this set states."""
    numbers = {word: number for number, words in NUMBERS.items() for word in words} | {"an": 1}
    matches = re.findall(
        rf"\b(?:({'|'.join(numbers)}) )?(?:(small|large) )?({'|'.join(COLOURS)}) "
        rf"({'|'.join(KINDS)})s?\b",
        caption,
    )
    groups = tuple(
        Group(numbers.get(number, 1), size or None, colour, kind)
        for number, size, colour, kind in matches
    )
    relation = re.search(rf"\b({'|'.join(RELATIONS)})\b", caption)
    background = re.search(rf"\b({'|'.join(BACKGROUNDS)}) background", caption)
    return groups, relation and relation[1], background and background[1]


def check_caption(image: Float[np.ndarray, "side side 3"], caption: str) -> Verdict:
    """Return what of a caption of this set the pixels (in [-1, 1]) show.

    Shapes and their kinds are found as the module says.
    """
    groups, relation, background = parse(caption)
    behind, seen, strays = find_shapes(image)
    wanted = [(g.colour, g.kind, g.size) for g in groups for _ in range(g.number)]
    count = len(seen) == len(wanted)
    colours = sorted(s.colour for s in seen) == sorted(w[0] for w in wanted)
    kinds = sorted(s[:2] for s in seen) == sorted(w[:2] for w in wanted)
    members = [[s for s in seen if s[:2] == (g.colour, g.kind)] for g in groups]
    there = all(members)
    placed = None
    if relation is not None and len(groups) == 2:
        placed = there and related(members[0], members[1], relation)
    sizes = None
    if any(group.size for group in groups):
        sizes = there and all(
            ("small" if s.width < BETWEEN else "large") == group.size
            for group, shapes in zip(groups, members, strict=True)
            for s in shapes
            if group.size
        )
    at = None if background is None else background == behind
    return Verdict(count, colours, kinds, placed, sizes, at, strays == 0)


def find_shapes(image: Float[np.ndarray, "side side 3"]) -> tuple[str, list[Shape], int]:
    """Return (background, shapes, number of smaller parts) of an image in [-1, 1].

    A colour or kind that is none of the set's is called `UNCLEAR`.
    """
    from scipy import ndimage

    pixels = (np.clip(np.asarray(image, np.float64), -1, 1) + 1) * 127.5
    side = len(pixels)
    scale = side / 32
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    behind = _nearest(np.median(border, 0), BACKGROUNDS)
    ground = np.array(BACKGROUNDS[behind], np.float64)
    apart = np.sqrt(np.square(pixels - ground).sum(-1))
    parts, count = ndimage.label(apart > APART)
    shapes, strays = [], 0
    for number in range(1, count + 1):
        part = parts == number
        if part.sum() < LEAST * scale**2:
            strays += bool(part.sum() >= STRAY * scale**2)
            continue
        inside = part & (ndimage.binary_erosion(part) if part.sum() > 24 * scale**2 else part)
        shade = np.median(pixels[inside if inside.any() else part], 0)
        colour, tint = _nearest(shade, COLOURS), shade - ground
        if np.sqrt(np.square(shade - COLOURS[colour]).sum()) > FAR:
            colour = UNCLEAR
        # How much of each pixel the shape covers, within a pixel of the part.
        near = ndimage.binary_dilation(part, np.ones((3, 3)))
        if tint.any():
            cover = np.clip((pixels - ground) @ tint / (tint @ tint), 0, 1) * near
        else:  # of many colours, whose medians are the background's
            colour, cover = UNCLEAR, part.astype(np.float64)
        shapes.append(_fit(colour, cover, scale))
    return behind, shapes, strays


def _nearest(colour: np.ndarray, among: dict[str, tuple[int, int, int]]) -> str:
    return min(among, key=lambda name: np.square(colour - np.array(among[name])).sum())


def _fit(colour: str, cover: np.ndarray, scale: float) -> Shape:
    """Return the kind whose drawing, of the area and centre of mass of `cover`, is closest."""
    place = np.arange(len(cover)) + 0.5
    area = cover.sum()
    x, y = (cover.sum(0) @ place) / area, (cover.sum(1) @ place) / area
    candidates = []
    for kind in KINDS:
        width = np.sqrt(area / AREA[kind])
        left, top = x - width / 2, y - width * CENTRE[kind]
        apart = np.square(cover - _drawn(kind, left, top, width, len(cover))).sum() / area
        box = (float(length / scale) for length in (left, top, width))
        candidates.append((apart, Shape(colour, kind, *box)))
    apart, best = min(candidates)
    return best if apart <= FIT else best._replace(kind=UNCLEAR)


def _drawn(
    kind: str, left: float, top: float, width: float, side: int
) -> Float[np.ndarray, "side side"]:
    """Return how much of every pixel a shape covers."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (side * OVERSAMPLE,) * 2)
    box = tuple(a * OVERSAMPLE for a in (left, top, left + width, top + width))
    box = (box[0], box[1], box[2] - 1, box[3] - 1)
    draw_shape(ImageDraw.Draw(image), kind, box, 255)
    return np.asarray(image.reduce(OVERSAMPLE), np.float64) / 255
