"""Hard negatives of the data set `shapes`: captions with one wrong statement about the image."""

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
VALUES: dict[str, Iterable[str | int]] = {  # allowed values of the fields of `Group`
    "colour": COLOURS,
    "kind": KINDS,
    "number": NUMBERS,
    "size": ("small", "large"),
}


def hard_negative(split: str, index: int, number: int = 0) -> str:
    """Return a hard negative of example `index` of a split: its caption with one wrong statement.

    `number`, from 0, selects one of many random hard negatives of the example. In each of them a
    count, size, colour, shape or background is replaced, two groups exchange their colours or
    shapes, or the relation is reversed. Changes that are harder to recognize are more frequent.
    The caption contains no held-out pair of colour and shape, except the pairs of the example.
    """
    true = scene(split, index)
    excluded = ALL_HELD_OUT - {(group.colour, group.kind) for group in true.groups}
    rng = stream(f"altered {split} {number}", index)
    while True:
        groups, relation, background = _altered(rng, true)
        pairs = [(group.colour, group.kind) for group in groups]
        ordered = relation is None or pairs == [(g.colour, g.kind) for g in true.groups]
        correct = _describes(groups, true) and ordered
        correct &= (relation, background) == (true.relation, true.background)
        colours = {group.colour for group in groups}
        plausible = len(set(pairs)) == len(pairs) and background not in colours
        plausible &= sum(group.number for group in groups) <= max(NUMBERS)
        if plausible and not correct and not excluded.intersection(pairs):
            return caption_of(rng, groups, relation, background)


def _describes(groups: Sequence[Group], scene: Scene) -> bool:
    """Return whether `groups` are the scene's groups in any order; a size is correct or None."""
    described = {(group.number, group.colour, group.kind) for group in groups}
    present = {(group.number, group.colour, group.kind) for group in scene.groups}
    sizes = {(s.colour, s.kind): "small" if s.width <= SMALL[1] else "large" for s in scene.shapes}
    return described == present and all(g.size in (None, sizes[g.colour, g.kind]) for g in groups)


def _altered(
    rng: np.random.Generator, scene: Scene
) -> tuple[tuple[Group, ...], str | None, str | None]:
    """Return the groups, the relation and the background of a caption after one random change.

    The result may equal the fields of `scene`, because a new value may equal the old value.
    """
    groups, relation, background = list(scene.groups), scene.relation, scene.background
    index = rng.integers(len(groups))
    group = groups[index]
    changes = ["colour", "number", "number", "kind", "kind", "kind"]
    changes += ["size"] if group.size else []
    changes += ["background"] if background else []
    if len(groups) == 2:
        changes += ["colours", "kinds"] * 2 + (["relation"] * 4 if relation else [])
    change = _choose(rng, changes)
    if change == "background":
        colours = {group.colour for group in groups}
        background = _choose(rng, (name for name in BACKGROUNDS if name not in colours))
    elif change == "relation":
        axis, smaller = RELATIONS[str(relation)]
        opposite = (axis, not smaller)
        relation = _choose(rng, (name for name in RELATIONS if RELATIONS[name] == opposite))
    elif change in ("colours", "kinds"):
        field, swapped = change[:-1], groups[::-1]
        groups = [
            g._replace(**{field: getattr(s, field)}) for g, s in zip(groups, swapped, strict=True)
        ]
    else:
        value: dict[str, Json] = {change: _choose(rng, VALUES[change])}
        groups[index] = group._replace(**value)
    return tuple(groups), relation, background


def _choose(rng: np.random.Generator, options: Iterable[T]) -> T:
    values = list(options)
    return values[rng.integers(len(values))]


def with_hard_negatives(data: Data, count: int) -> Data:
    """Return `data`, the data set `shapes`, with `count` hard negatives added for each image.

    The captions become uint8 [N, 1 + count, LENGTH]; index 0 of the second axis is the correct
    caption, and the other indices are hard negatives.
    """
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
