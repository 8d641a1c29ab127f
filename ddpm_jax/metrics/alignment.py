"""Check from the pixels that an image of the data set `shapes` shows what a caption states.

The check uses no trained network, but the code that renders the data set (`data/shapes.py`). A
shape is a connected region of pixels that differ from the background colour. A circle, a square and
a triangle with the area and the centre of mass of the region are rendered. The shape gets the kind
whose rendering has the smallest squared error.
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

# Distances between colours are Euclidean distances of RGB values in [0, 255]. Areas and widths are
# in pixels of an image of 32 x 32 pixels.
FOREGROUND_DISTANCE = 60.0  # smallest distance of a shape's pixel from the background
COLOUR_TOLERANCE = 80.0  # largest distance of a shape from the colour with its name
MAX_FIT_ERROR = 0.1  # largest sum of squared errors of the coverage, divided by the area
MIN_SHAPE_AREA = 12.0  # smaller regions are not shapes
MIN_FRAGMENT_AREA = 4.0  # smaller regions are ignored
SIZE_BOUNDARY = 9.75  # smaller widths are "small", larger widths are "large"
AREA = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # area at width 1
CENTRE = {"circle": 1 / 2, "square": 1 / 2, "triangle": 2 / 3}  # mean y at width 1
UNCLEAR = "unclear"  # name of all other colours and kinds


class CaptionCheck(NamedTuple):
    """The result of comparing an image with a caption.

    Attributes:
      number: True if the image shows as many shapes as the caption states.
      colours: True if the shapes have the colours that the caption states.
      kinds: True if the pairs of colour and kind (such as red circle) agree with the caption.
      relation: True if the two groups of shapes are in the relation that the caption states (such
        as "above"); None if the caption does not state a relation.
      sizes: True if the shapes have the sizes that the caption states; None if it states no sizes.
      background: True if the background has the colour that the caption states; None if the caption
        does not state it.
      no_fragments: True if no region of the image is too small for a shape.
    """

    number: bool
    colours: bool
    kinds: bool
    relation: bool | None
    sizes: bool | None
    background: bool | None
    no_fragments: bool

    @property
    def aligned(self) -> bool:
        """True if the image shows everything that the caption states and has no fragments."""
        details = self.sizes is not False and self.background is not False
        return self.aligned_except_size_and_background and details and self.no_fragments

    @property
    def aligned_except_size_and_background(self) -> bool:
        """True if number, colours, kinds and relation of shapes agree; fragments are allowed."""
        return self.number and self.colours and self.kinds and self.relation is not False


def parse(caption: str) -> tuple[tuple[Group, ...], str | None, str | None]:
    """Return (groups, relation, background) of a caption of the data set `shapes`.

    A group is a number of equal shapes. Relation and background are None if not in the caption.
    """
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


def check_caption(image: Float[np.ndarray, "side side 3"], caption: str) -> CaptionCheck:
    """Compare an image, [side, side, 3] in [-1, 1], with a caption of the data set `shapes`."""
    groups, relation, background = parse(caption)
    image_background, shapes, fragments = find_shapes(image)
    expected = sorted((g.colour, g.kind) for g in groups for _ in range(g.number))
    actual = sorted((s.colour, s.kind) for s in shapes)
    members = [[s for s in shapes if (s.colour, s.kind) == (g.colour, g.kind)] for g in groups]
    relation_holds = None
    if relation is not None and len(groups) == 2:
        relation_holds = all(members) and related(members[0], members[1], relation)
    sizes_agree = None
    if any(group.size for group in groups):
        sizes_agree = all(members) and all(
            ("small" if s.width < SIZE_BOUNDARY else "large") == group.size
            for group, group_shapes in zip(groups, members, strict=True)
            for s in group_shapes
            if group.size
        )
    return CaptionCheck(
        number=len(actual) == len(expected),
        colours=[colour for colour, _ in actual] == [colour for colour, _ in expected],
        kinds=actual == expected,
        relation=relation_holds,
        sizes=sizes_agree,
        background=None if background is None else background == image_background,
        no_fragments=fragments == 0,
    )


def find_shapes(image: Float[np.ndarray, "side side 3"]) -> tuple[str, list[Shape], int]:
    """Return (background colour, shapes, number of fragments) of an image in [-1, 1].

    A fragment is a region of `MIN_FRAGMENT_AREA` to `MIN_SHAPE_AREA` pixels. Colours and kinds of
    shapes that do not occur in the data set `shapes` are named "unclear".
    """
    from scipy import ndimage

    pixels = (np.clip(np.asarray(image, np.float64), -1, 1) + 1) * 127.5
    scale = len(pixels) / 32
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest_colour(np.median(border, 0), BACKGROUNDS)
    background_rgb = np.array(BACKGROUNDS[background], np.float64)
    distance = np.sqrt(np.square(pixels - background_rgb).sum(-1))
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE)
    shapes, fragments = [], 0
    for number in range(1, count + 1):
        region = labels == number
        if region.sum() < MIN_SHAPE_AREA * scale**2:
            fragments += bool(region.sum() >= MIN_FRAGMENT_AREA * scale**2)
            continue
        # Pixels at the edge of a shape are mixed with the background.
        inside = region
        if region.sum() > 24 * scale**2:
            inside = region & ndimage.binary_erosion(region)
        rgb = np.median(pixels[inside if inside.any() else region], 0)
        colour, contrast = _nearest_colour(rgb, COLOURS), rgb - background_rgb
        if np.sqrt(np.square(rgb - COLOURS[colour]).sum()) > COLOUR_TOLERANCE:
            colour = UNCLEAR
        if contrast.any():  # project the pixels in and around the region on the contrast
            surroundings = ndimage.binary_dilation(region, np.ones((3, 3)))
            coverage = (pixels - background_rgb) @ contrast / (contrast @ contrast)
            coverage = np.clip(coverage, 0, 1) * surroundings
        else:  # a region of many colours, whose median is the background colour
            colour, coverage = UNCLEAR, region.astype(np.float64)
        shapes.append(_closest_shape(colour, coverage, scale))
    return background, shapes, fragments


def _nearest_colour(rgb: np.ndarray, colours: dict[str, tuple[int, int, int]]) -> str:
    return min(colours, key=lambda name: np.square(rgb - np.array(colours[name])).sum())


def _closest_shape(colour: str, coverage: Float[np.ndarray, "side side"], scale: float) -> Shape:
    """Return the shape whose rendering has the smallest squared error from `coverage`.

    Args:
      colour: The colour of the shape.
      coverage: The part of each pixel that the shape covers, [side, side] in [0, 1].
      scale: The side of the image in pixels, divided by 32.
    """
    position = np.arange(len(coverage)) + 0.5
    area = coverage.sum()
    x, y = (coverage.sum(0) @ position) / area, (coverage.sum(1) @ position) / area
    candidates = []
    for kind in KINDS:
        width = np.sqrt(area / AREA[kind])
        left, top = x - width / 2, y - width * CENTRE[kind]
        rendered = _render_coverage(kind, left, top, width, len(coverage))
        error = np.square(coverage - rendered).sum() / area
        box = (float(length / scale) for length in (left, top, width))
        candidates.append((error, Shape(colour, kind, *box)))
    error, shape = min(candidates)
    return shape if error <= MAX_FIT_ERROR else shape._replace(kind=UNCLEAR)


def _render_coverage(
    kind: str, left: float, top: float, width: float, side: int
) -> Float[np.ndarray, "side side"]:
    """Return the part of each pixel, in [0, 1], that a shape covers; lengths are in pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (side * OVERSAMPLE,) * 2)
    box = tuple(a * OVERSAMPLE for a in (left, top, left + width, top + width))
    box = (box[0], box[1], box[2] - 1, box[3] - 1)
    draw_shape(ImageDraw.Draw(image), kind, box, 255)
    return np.asarray(image.reduce(OVERSAMPLE), np.float64) / 255
