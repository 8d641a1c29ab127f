"""`shapes`: an endless set of drawn shapes with captions, at 32 pixels, or `shapes:64`.

One to three circles, squares and triangles, in one or two groups that a caption names by
number, size, colour, shape and relation:

    a small red circle to the left of a large blue square on a green background

Two examples of three have two groups, which are the hardest to draw, and five of six of those a
relation.  `HELD_OUT` pairs of colour and shape occur in no training example: every second example
of the validation split has one of that split's pairs, and every second one of the test split one of
the test split's, which no validation example has.  Example i of a split is a pure function of
(split, i): drawn antialiased when it is asked for, and so never twice in a training.

`ddpm_jax/metrics/alignment.py` reads all that back from an image's pixels.
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
LENGTH = 96  # bytes of a caption, at most
HELD_OUT_EXAMPLES = 2048  # of the validation split, and of the test split
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
SMALL, LARGE = (7.0, 8.5), (11.0, 13.5)  # pixels of 32 either way
GAP = 2.0  # pixels of 32 between shapes, and one to the border
NUMBERS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
RELATIONS = {  # which axis, and whether the first group has the smaller coordinate on it
    "to the left of": (0, True),
    "left of": (0, True),
    "to the right of": (0, False),
    "right of": (0, False),
    "above": (1, True),
    "over": (1, True),
    "below": (1, False),
    "under": (1, False),
}
OVERSAMPLE = 8
TRIES = 64  # places of all shapes that are looked at, at once


class Group(NamedTuple):
    """So many shapes that are alike; `size` None: a caption does not say."""

    number: int
    size: str | None
    colour: str
    kind: str


class Shape(NamedTuple):
    """A drawn one: its group's looks, and its box in pixels of 32 (left, top, width)."""

    colour: str
    kind: str
    left: float
    top: float
    width: float


class Scene(NamedTuple):
    """What is drawn and what is said of it.

    `background` and `relation` are None where the caption does not state them; `behind` is what is
    behind the shapes.
    """

    groups: tuple[Group, ...]
    relation: str | None
    background: str | None
    behind: str
    shapes: tuple[Shape, ...]
    caption: str


# Scenes: pure functions of (split, index).


@functools.lru_cache(4096)  # a picture and its caption ask one after the other
def scene(split: str, index: int, only: str | None = None) -> Scene:
    """Return example `index` of a split.

    Args:
      split: "train", "validation" or "test", and after a space any words, which name another
        stream of examples of that split.
      only: "single": one shape; "relation": two shapes with a relation; None: any.  With
        " held out" behind it, one of the split's held-out pairs occurs, without, none does.

    Raises:
      AssertionError: the shapes of 1,000 attempts did not fit, which does not happen.
    """
    allowed = HELD_OUT.get(split.partition(" ")[0], frozenset())
    for attempt in range(1000):  # until the shapes fit
        draw = stream(f"{split} {only}", index * 1000 + attempt)
        groups, relation = _groups(draw, only)
        unseen = ALL_HELD_OUT.intersection((group.colour, group.kind) for group in groups)
        mixed = bool(allowed) and index % 2 == 1
        wanted = mixed if only is None else only.endswith("held out")
        if bool(unseen) != wanted or not unseen <= allowed:
            continue
        free = [name for name in BACKGROUNDS if name not in {group.colour for group in groups}]
        behind = free[draw.integers(len(free))]
        shapes = _place(draw, groups, relation)
        if shapes is not None:
            background = behind if draw.random() < 0.6 else None
            groups = tuple(
                group._replace(size=None) if draw.random() < 0.3 else group for group in groups
            )
            caption = caption_of(draw, groups, relation, background)
            return Scene(groups, relation, background, behind, shapes, caption)
    raise AssertionError(f"no scene for {split} {index}")


def stream(words: str, number: int) -> np.random.Generator:
    """Return random stream `number` of the ones named `words`."""
    name = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=[int.from_bytes(name, "little"), number]))


def _group(draw: np.random.Generator, number: int) -> Group:
    colour, kind, size = (
        values[draw.integers(len(values))] for values in (tuple(COLOURS), KINDS, ("small", "large"))
    )
    return Group(number, size, colour, kind)


def _groups(draw: np.random.Generator, only: str | None) -> tuple[tuple[Group, ...], str | None]:
    kind = (only or "any").split()[0]
    numbers: tuple[int, ...] = ((1,), (2,), (3,), (1, 1), (1, 1), (1, 2), (2, 1))[
        draw.choice(7, p=[0.18, 0.05, 0.04, 0.305, 0.305, 0.06, 0.06])
    ]
    if kind == "single":
        numbers = (1,)
    elif kind == "relation":
        numbers = (1, 1)
    while True:
        groups = tuple(_group(draw, number) for number in numbers)
        if len({(g.colour, g.kind) for g in groups}) == len(groups):  # distinct without sizes
            break
    relation = None
    if len(groups) == 2 and (kind == "relation" or draw.random() < 0.85):
        relation = tuple(RELATIONS)[draw.integers(len(RELATIONS))]
    return groups, relation


def is_named(data: str) -> bool:
    """Return whether `--config.data` names this set, of whatever size."""
    return data.partition(":")[0] == "shapes"


def _place(
    draw: np.random.Generator, groups: tuple[Group, ...], relation: str | None
) -> tuple[Shape, ...] | None:
    """Return boxes in 32 pixels, apart and in their relation; None if there was no room."""
    owner = np.repeat(np.arange(len(groups)), [group.number for group in groups])
    spans = np.array([SMALL if group.size == "small" else LARGE for group in groups])[owner]
    width = spans[:, 0] + (spans[:, 1] - spans[:, 0]) * draw.random((TRIES, len(owner)))
    # [tries, axes, shapes]: left and right, top and bottom.
    low = 1 + (30 - width[:, None]) * draw.random((TRIES, 2, len(owner)))
    high = low + width[:, None]
    good = np.ones(TRIES, bool)
    for i in range(len(owner)):
        for j in range(i):
            before = high[:, :, i] + GAP <= low[:, :, j]
            after = high[:, :, j] + GAP <= low[:, :, i]
            good &= (before | after).any(1)
    if relation is not None:
        axis, smaller = RELATIONS[relation]
        less, more = (owner == 0, owner == 1) if smaller else (owner == 1, owner == 0)
        good &= high[:, axis][:, less].max(1) + GAP <= low[:, axis][:, more].min(1)
    if not good.any():
        return None
    first = int(good.argmax())
    return tuple(
        Shape(groups[group].colour, groups[group].kind, *map(float, place))
        for group, *place in zip(owner, *low[first], width[first], strict=True)
    )


def related(first: Sequence[Shape], second: Sequence[Shape], relation: str) -> bool:
    """Return whether all of `first` lie on their side of all of `second`."""
    axis, smaller = RELATIONS[relation]
    low, high = (first, second) if smaller else (second, first)
    ends = [(s.left, s.top)[axis] + s.width for s in low]
    return max(ends) <= min((s.left, s.top)[axis] for s in high)


def _noun(draw: np.random.Generator, group: Group) -> str:
    number = NUMBERS[group.number][draw.integers(len(NUMBERS[group.number]))]
    words = [number, group.size, group.colour, group.kind + "s" * (group.number > 1)]
    if group.size is None and number == "a" and group.colour[0] in "aeiou":
        words[0] = "an"
    return " ".join(word for word in words if word)


def caption_of(
    draw: np.random.Generator,
    groups: tuple[Group, ...],
    relation: str | None,
    background: str | None,
) -> str:
    """Return a caption of a scene in one of several forms.

    Args:
      draw: draws the form.
      groups: of shapes.
      relation: of the two groups; None: there is none, or it is left out.
      background: its colour; None: it is left out.
    """
    names = [_noun(draw, group) for group in groups]
    text = f" {relation} ".join(names) if relation else " and ".join(names)
    if background is None:
        return text
    form = draw.integers(3)
    if form == 0:
        return f"{text} on a {background} background"
    if form == 1:
        return f"{text}, {background} background"
    return f"a {background} background with {text}"


# Pictures.


def render(scene: Scene, side: int = 32) -> np.ndarray:
    """Return the picture of a scene, uint8 [side, side, 3]: drawn larger, and averaged."""
    scale = OVERSAMPLE * side / 32
    image = Image.new("RGB", (side * OVERSAMPLE,) * 2, BACKGROUNDS[scene.behind])
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
      pen: draws into the picture.
      kind: circle, square or triangle.
      box: left, top, right, bottom; the last pixels lie within it.
      colour: red, green and blue, or grey.
    """
    left, top, right, bottom = box
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)


def computed_split(split: str, rows: range, side: int) -> Split:
    """Return a split's pictures and captions; there are no labels."""
    images = Computed(lambda i: render(scene(split, i), side), rows, (side, side, 3))
    labels = Computed(lambda i: -1, rows, (), np.int32)
    captions = Computed(lambda i: tokenize([scene(split, i).caption], LENGTH)[0], rows, (LENGTH,))
    return Split(images, labels, captions)


def load(argument: str, data_dir: str | None) -> Data:
    """Return all splits, whose images are rendered when they are read.

    Raises:
      UserError: `argument` is not a supported size.
    """
    del data_dir  # there are no files
    side = int(argument) if argument.isdecimal() else 32
    if argument not in ("", *map(str, SIDES)):
        raise UserError(f"shapes:{argument}: the size must be {' or '.join(map(str, SIDES))}")
    return Data(
        name="shapes" + (f":{side}" if argument else ""),
        title=f"shapes {side}x{side} (drawn)",
        train=computed_split("train", range(ENDLESS), side),
        validation=computed_split("validation", range(HELD_OUT_EXAMPLES), side),
        test=computed_split("test", range(HELD_OUT_EXAMPLES), side),
        levels=256,
        classes=(),
        fingerprint=_fingerprint(side),
    )


def _fingerprint(side: int) -> str:
    """Return a checksum of the first images and captions: other rendering is another data set."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(32):
            example = scene(split, index)
            digest.update(example.caption.encode() + render(example, side).tobytes())
    return digest.hexdigest()[:16]
