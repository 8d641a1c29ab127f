"""Hard negatives of `shapes`: captions with one statement that is wrong for the image."""

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
    """Return hard negative `number` of example `index`: a caption with one wrong statement.

    A number, size, colour, shape or background is replaced, two groups exchange their colours or
    shapes, or the relation is reversed. Changes that are harder to recognize are more frequent.
    The caption contains no held-out pair of colour and shape, except those of the example.
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
    """Return whether groups are those of a scene in any order, with correct sizes if stated."""
    described = {(group.number, group.colour, group.kind) for group in groups}
    present = {(group.number, group.colour, group.kind) for group in scene.groups}
    sizes = {(s.colour, s.kind): "small" if s.width <= SMALL[1] else "large" for s in scene.shapes}
    return described == present and all(g.size in (None, sizes[g.colour, g.kind]) for g in groups)


def _altered(
    rng: np.random.Generator, scene: Scene
) -> tuple[tuple[Group, ...], str | None, str | None]:
    """Return the groups, relation and background of a scene after one random change.

    The change can leave the scene as it is, because a new value may equal the old one.
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
    """Return `data` with `count` hard negatives after each caption.

    The captions become uint8 [N, 1 + count, LENGTH], and the correct caption of an image is first.
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
