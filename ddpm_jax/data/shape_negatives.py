"""Hard negatives of `shapes`: captions that differ from an image's own in one statement."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from ddpm_jax.data.shapes import (
    ALL_HELD_OUT,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    LENGTH,
    NUMBERS,
    RELATIONS,
    SMALL,
    Group,
    Scene,
    caption_of,
    scene,
    stream,
)
from ddpm_jax.data.tokenizer import tokenize
from ddpm_jax.data.types import Computed, Data, Split
from ddpm_jax.fields import Json

T = TypeVar("T")
VALUES: dict[str, Iterable[str | int]] = {  # of the fields of a group
    "colour": COLOURS,
    "kind": KINDS,
    "number": NUMBERS,
    "size": ("small", "large"),
}


def hard_negative(split: str, index: int, number: int = 0) -> str:
    """Return a caption with one wrong statement on example `index` (used by `contrastive.py`).

    A number, size, colour, shape or background is a different one, two groups have exchanged
    colours or shapes, or the relation is reversed: more often what is harder to distinguish.  No
    held-out pair is named but the example's own.
    """
    true = scene(split, index)
    unseen = ALL_HELD_OUT - {(group.colour, group.kind) for group in true.groups}
    draw = stream(f"altered {split} {number}", index)
    while True:
        groups, relation, background = _hard_negative(draw, true)
        pairs = [(group.colour, group.kind) for group in groups]
        ordered = relation is None or pairs == [(g.colour, g.kind) for g in true.groups]
        right = _describe(groups, true) and ordered
        right &= (relation, background) == (true.relation, true.background)
        colours = {group.colour for group in groups}
        usual = len(set(pairs)) == len(pairs) and background not in colours
        usual &= sum(group.number for group in groups) <= max(NUMBERS)
        if usual and not right and not unseen.intersection(pairs):
            return caption_of(draw, groups, relation, background)


def _describe(groups: Sequence[Group], scene: Scene) -> bool:
    """Return whether groups, in any order, are a scene's, with its sizes where they have any."""
    looks = {(group.number, group.colour, group.kind) for group in groups}
    drawn = {(group.number, group.colour, group.kind) for group in scene.groups}
    sizes = {(s.colour, s.kind): "small" if s.width <= SMALL[1] else "large" for s in scene.shapes}
    return looks == drawn and all(g.size in (None, sizes[g.colour, g.kind]) for g in groups)


def _hard_negative(
    draw: np.random.Generator, scene: Scene
) -> tuple[tuple[Group, ...], str | None, str | None]:
    """Return groups, relation and background of a scene, one of which is sampled anew."""
    groups, relation, background = list(scene.groups), scene.relation, scene.background
    which = draw.integers(len(groups))
    group = groups[which]
    kinds = ["colour", "number", "number", "kind", "kind", "kind"]
    kinds += ["size"] if group.size else []
    kinds += ["background"] if background else []
    if len(groups) == 2:
        kinds += ["colours", "kinds"] * 2 + (["relation"] * 4 if relation else [])
    what = _choose(draw, kinds)
    if what == "background":
        colours = {group.colour for group in groups}
        background = _choose(draw, (name for name in BACKGROUNDS if name not in colours))
    elif what == "relation":
        axis, smaller = RELATIONS[str(relation)]
        opposite = (axis, not smaller)
        relation = _choose(draw, (name for name in RELATIONS if RELATIONS[name] == opposite))
    elif what in ("colours", "kinds"):
        field, back = what[:-1], groups[::-1]
        groups = [
            g._replace(**{field: getattr(b, field)}) for g, b in zip(groups, back, strict=True)
        ]
    else:
        value: dict[str, Json] = {what: _choose(draw, VALUES[what])}
        groups[which] = group._replace(**value)
    return tuple(groups), relation, background


def _choose(draw: np.random.Generator, options: Iterable[T]) -> T:
    values = list(options)
    return values[draw.integers(len(values))]


def with_hard_negatives(data: Data, count: int) -> Data:
    """Return `data` with captions [1 + count, LENGTH]: an image's own and `count` negatives."""
    train = _with_negatives("train", data.train, count)
    validation = data.validation and _with_negatives("validation", data.validation, count)
    test = _with_negatives("test", data.test, count)
    return data._replace(train=train, validation=validation, test=test)


def _with_negatives(name: str, split: Split, count: int) -> Split:
    def make(index: int) -> np.ndarray:
        texts = [hard_negative(name, index, number) for number in range(count)]
        return tokenize([scene(name, index).caption, *texts], LENGTH)

    captions = Computed(make, split.captions.numbers, (1 + count, LENGTH))
    return split._replace(captions=captions)
