"""`shapes`: an endless set of images of simple shapes with captions, 32x32 pixels.

The images of `shapes:64` have 64x64 pixels.  An image has one to three shapes in one or two groups.
The shapes of a group are all circles, all squares or all triangles, of one size and colour.  The
caption states the number, size, colour and shape of each group and, of most images with two groups,
their relation:

    a small red circle to the left of a large blue square on a green background

Two thirds of the examples have two groups, which are the hardest to generate, and five sixths of
their captions state a relation.  The `HELD_OUT` pairs of colour and shape occur in no training
example.  Every second validation example has a pair of `HELD_OUT["validation"]`, and every second
test example has a pair of `HELD_OUT["test"]`.  Example i of a split is a pure function of
(split, i) and is rendered when it is read, so no training example occurs twice.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ddpm_jax.data.tokenizer import tokenize
from ddpm_jax.data.types import ENDLESS, SPLITS, Computed, Data, Split
from ddpm_jax.errors import UserError

SIDES = (32, 64)
LENGTH = 96  # tokens (bytes) of a caption, padding included
HELD_OUT_EXAMPLES = 2048  # examples in each of the validation and test splits
KINDS = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "cyan": (50, 200, 220),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
    "yellow": COLOURS["yellow"],
}
HELD_OUT = {
    "validation": frozenset({("green", "triangle"), ("orange", "circle")}),
    "test": frozenset(
        {("red", "triangle"), ("blue", "circle"), ("yellow", "square"), ("purple", "triangle")}
    ),
}
ALL_HELD_OUT = frozenset().union(*HELD_OUT.values())
# Sizes and positions are in pixels of a 32x32 image.
SMALL, LARGE = (7.0, 8.5), (11.0, 13.5)  # range of the width of a shape
GAP = 2.0  # smallest distance between shapes; the smallest distance to the border is 1
NUMBERS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
RELATIONS = {  # (axis, True if the first group has the smaller coordinates on this axis)
    "to the left of": (0, True),
    "left of": (0, True),
    "to the right of": (0, False),
    "right of": (0, False),
    "above": (1, True),
    "over": (1, True),
    "below": (1, False),
    "under": (1, False),
}
OVERSAMPLE = 8  # images are rendered at this multiple of their size and then reduced
TRIES = 64  # random arrangements that are tried at once


class Group(NamedTuple):
    """A group of shapes with the same colour, kind and size.

    Attributes:
      number: The number of shapes.
      size: "small" or "large"; None if the caption does not state it.
      colour: A key of `COLOURS`.
      kind: One of `KINDS`.
    """

    number: int
    size: str | None
    colour: str
    kind: str


class Shape(NamedTuple):
    """A shape in a square box; left, top and width are in pixels of a 32x32 image."""

    colour: str
    kind: str
    left: float
    top: float
    width: float


class Scene(NamedTuple):
    """The content of an image and its caption.

    Attributes:
      groups: One or two groups of shapes.
      relation: A key of `RELATIONS`; None if the caption does not state a relation.
      background: The background colour in the caption; None if the caption does not state it.
      background_colour: The background colour of the image, a key of `BACKGROUNDS`.
      shapes: All shapes of the image.
      caption: The caption.
    """

    groups: tuple[Group, ...]
    relation: str | None
    background: str | None
    background_colour: str
    shapes: tuple[Shape, ...]
    caption: str


# Scenes: pure functions of (split, index).


@functools.lru_cache(4096)  # the image and the caption of an example need the same scene
def scene(split: str, index: int, only: str | None = None) -> Scene:
    """Return the scene of example `index` of a split.

    Args:
      split: "train", "validation" or "test". A space and a word may follow; each word selects other
        random examples.
      index: The index of the example, from 0.
      only: If "single", the scene has one shape; if "relation", it has two shapes with a relation.
        With the ending " held out" it has a held-out pair of the split, otherwise no held-out pair.
        If None, one to three shapes; odd indices have a held-out pair if the split has such pairs.

    Raises:
      AssertionError: If 1,000 attempts fail, which does not happen.
    """
    allowed = HELD_OUT.get(split.partition(" ")[0], frozenset())
    for attempt in range(1000):
        rng = stream(f"{split} {only}", index * 1000 + attempt)
        groups, relation = _groups(rng, only)
        held_out = ALL_HELD_OUT.intersection((group.colour, group.kind) for group in groups)
        odd_index = bool(allowed) and index % 2 == 1
        needs_held_out = odd_index if only is None else only.endswith("held out")
        if bool(held_out) != needs_held_out or not held_out <= allowed:
            continue
        free = [name for name in BACKGROUNDS if name not in {group.colour for group in groups}]
        behind = free[rng.integers(len(free))]
        shapes = _arrange(rng, groups, relation)
        if shapes is not None:
            background = behind if rng.random() < 0.6 else None
            groups = tuple(
                group._replace(size=None) if rng.random() < 0.3 else group for group in groups
            )
            caption = caption_of(rng, groups, relation, background)
            return Scene(groups, relation, background, behind, shapes, caption)
    raise AssertionError(f"no valid scene in 1,000 attempts for example {index} of split {split}")


def stream(words: str, number: int) -> np.random.Generator:
    """Return a random number generator whose seed is a function of `words` and `number`."""
    name = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=[int.from_bytes(name, "little"), number]))


def _group(rng: np.random.Generator, number: int) -> Group:
    colour, kind, size = (
        values[rng.integers(len(values))] for values in (tuple(COLOURS), KINDS, ("small", "large"))
    )
    return Group(number, size, colour, kind)


def _groups(rng: np.random.Generator, only: str | None) -> tuple[tuple[Group, ...], str | None]:
    """Sample one or two groups, and their relation or None (`only` is as in `scene`)."""
    layout = (only or "any").split()[0]
    numbers: tuple[int, ...] = ((1,), (2,), (3,), (1, 1), (1, 1), (1, 2), (2, 1))[
        rng.choice(7, p=[0.18, 0.05, 0.04, 0.305, 0.305, 0.06, 0.06])
    ]
    if layout == "single":
        numbers = (1,)
    elif layout == "relation":
        numbers = (1, 1)
    while True:
        groups = tuple(_group(rng, number) for number in numbers)
        if len({(g.colour, g.kind) for g in groups}) == len(groups):  # distinct without sizes
            break
    relation = None
    if len(groups) == 2 and (layout == "relation" or rng.random() < 0.85):
        relation = tuple(RELATIONS)[rng.integers(len(RELATIONS))]
    return groups, relation


def is_shapes(data: str) -> bool:
    """Return whether the data set name `data` is `shapes` or `shapes:SIZE`."""
    return data.partition(":")[0] == "shapes"


def _arrange(
    rng: np.random.Generator, groups: tuple[Group, ...], relation: str | None
) -> tuple[Shape, ...] | None:
    """Sample shapes that do not overlap and satisfy the relation; return None if all tries fail."""
    group_of = np.repeat(np.arange(len(groups)), [group.number for group in groups])
    ranges = np.array([SMALL if group.size == "small" else LARGE for group in groups])[group_of]
    width = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * rng.random((TRIES, len(group_of)))
    # [tries, axes, shapes]: low is (left, top), high is (right, bottom).
    low = 1 + (30 - width[:, None]) * rng.random((TRIES, 2, len(group_of)))
    high = low + width[:, None]
    valid = np.ones(TRIES, bool)
    for i in range(len(group_of)):
        for j in range(i):
            before = high[:, :, i] + GAP <= low[:, :, j]
            after = high[:, :, j] + GAP <= low[:, :, i]
            valid &= (before | after).any(1)
    if relation is not None:
        axis, smaller = RELATIONS[relation]
        less, more = (group_of == 0, group_of == 1) if smaller else (group_of == 1, group_of == 0)
        valid &= high[:, axis][:, less].max(1) + GAP <= low[:, axis][:, more].min(1)
    if not valid.any():
        return None
    first = int(valid.argmax())
    return tuple(
        Shape(groups[group].colour, groups[group].kind, *map(float, box))
        for group, *box in zip(group_of, *low[first], width[first], strict=True)
    )


def related(first: Sequence[Shape], second: Sequence[Shape], relation: str) -> bool:
    """Return whether all shapes of `first` are, for example, "above" all shapes of `second`."""
    axis, smaller = RELATIONS[relation]
    low, high = (first, second) if smaller else (second, first)
    ends = [(s.left, s.top)[axis] + s.width for s in low]
    return max(ends) <= min((s.left, s.top)[axis] for s in high)


def _noun(rng: np.random.Generator, group: Group) -> str:
    """Return the words for a group, such as "two small red circles"."""
    number = NUMBERS[group.number][rng.integers(len(NUMBERS[group.number]))]
    words = [number, group.size, group.colour, group.kind + "s" * (group.number > 1)]
    if group.size is None and number == "a" and group.colour[0] in "aeiou":
        words[0] = "an"
    return " ".join(word for word in words if word)


def caption_of(
    rng: np.random.Generator,
    groups: tuple[Group, ...],
    relation: str | None,
    background: str | None,
) -> str:
    """Return a caption of a scene; the form of the sentence is random.

    Args:
      rng: The random number generator that selects the form.
      groups: One or two groups of shapes.
      relation: The relation of the two groups; if None, the caption does not state a relation.
      background: The background colour; if None, the caption does not state the background.
    """
    names = [_noun(rng, group) for group in groups]
    text = f" {relation} ".join(names) if relation else " and ".join(names)
    if background is None:
        return text
    form = rng.integers(3)
    if form == 0:
        return f"{text} on a {background} background"
    if form == 1:
        return f"{text}, {background} background"
    return f"a {background} background with {text}"


# Images.


def render(scene: Scene, side: int = 32) -> np.ndarray:
    """Return the image of a scene, uint8 [side, side, 3]; the edges are antialiased."""
    scale = OVERSAMPLE * side / 32
    image = Image.new("RGB", (side * OVERSAMPLE,) * 2, BACKGROUNDS[scene.background_colour])
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        left, top = round(shape.left * scale), round(shape.top * scale)
        size = round(shape.width * scale) - 1
        draw_shape(pen, shape.kind, (left, top, left + size, top + size), COLOURS[shape.colour])
    return np.asarray(image.reduce(OVERSAMPLE))


def draw_shape(
    pen: ImageDraw.ImageDraw,
    kind: str,
    box: tuple[int | float, ...],
    colour: int | tuple[int, int, int],
) -> None:
    """Draw one shape that fills a box.

    Args:
      pen: The Pillow drawing context of the image.
      kind: One of `KINDS`.
      box: (left, top, right, bottom) in pixels; right and bottom are included.
      colour: (red, green, blue) or grey, in 0 ... 255.
    """
    left, top, right, bottom = box
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)


def computed_split(split: str, rows: range, side: int) -> Split:
    """Return the examples `rows` of a split, computed when they are read; all labels are -1."""
    images = Computed(lambda i: render(scene(split, i), side), rows, (side, side, 3))
    labels = Computed(lambda i: -1, rows, (), np.int32)
    captions = Computed(lambda i: tokenize([scene(split, i).caption], LENGTH)[0], rows, (LENGTH,))
    return Split(images, labels, captions)


def load(argument: str, data_dir: str | None) -> Data:
    """Return the data set `shapes` with images of `argument` x `argument` pixels ("" means 32).

    Raises:
      UserError: If `argument` is not a supported size.
    """
    del data_dir  # there are no files
    side = int(argument) if argument.isdecimal() else 32
    if argument not in ("", *map(str, SIDES)):
        raise UserError(
            f"shapes:{argument} is not allowed; the size must be {' or '.join(map(str, SIDES))}"
        )
    return Data(
        name="shapes" + (f":{side}" if argument else ""),
        title=f"shapes {side}x{side} (rendered)",
        train=computed_split("train", range(ENDLESS), side),
        validation=computed_split("validation", range(HELD_OUT_EXAMPLES), side),
        test=computed_split("test", range(HELD_OUT_EXAMPLES), side),
        levels=256,
        classes=(),
        fingerprint=_fingerprint(side),
    )


def _fingerprint(side: int) -> str:
    """Return a hash of the first 32 examples of each split, which detects changes in rendering."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(32):
            example = scene(split, index)
            digest.update(example.caption.encode() + render(example, side).tobytes())
    return digest.hexdigest()[:16]
