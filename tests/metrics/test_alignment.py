"""The check of images of the data set `shapes` against captions."""

import numpy as np
import pytest

from ddpm_jax.data import shapes
from ddpm_jax.metrics import alignment
from helpers.data_sets import shapes_example


@pytest.mark.parametrize("side", shapes.SIDES)
def test_the_shapes_of_rendered_scenes_are_recovered(side):
    wrong = misplaced = 0
    for index in range(500):
        image, scene = shapes_example(index, side=side)
        wrong += not alignment.check_caption(image, scene.caption).aligned
        background, shapes_found, fragments = alignment.find_shapes(image)
        assert not fragments
        assert background == scene.background_colour
        actual, expected = (
            sorted((s.colour, s.kind, s.left, s.top) for s in group)
            for group in (shapes_found, scene.shapes)
        )
        misplaced += len(actual) != len(expected) or any(
            a[:2] != b[:2] or np.abs(np.subtract(a[2:], b[2:])).max() > 1
            for a, b in zip(actual, expected, strict=True)
        )
    assert wrong <= 2  # at least 99.5 % are aligned
    assert misplaced <= 2


def test_an_image_is_not_aligned_with_the_caption_of_other_shapes():
    compared = 0
    for index in range(300):
        image, scene = shapes_example(index)
        caption = shapes.scene("train", index + 1).caption
        groups, other_groups = (
            sorted((g.number, g.colour, g.kind) for g in alignment.parse(text)[0])
            for text in (scene.caption, caption)
        )
        if groups != other_groups:
            assert not alignment.check_caption(image, caption).aligned
            compared += 1
    assert compared > 200


def test_the_opposite_relation_is_not_aligned():
    opposite = {"left": "right", "above": "below", "over": "under"}
    opposite |= {value: key for key, value in opposite.items()}
    for index in range(100):
        image, scene = shapes_example(index, "any", "relation")
        word = next(w for w in opposite if w in scene.relation)
        caption = scene.caption.replace(
            scene.relation, scene.relation.replace(word, opposite[word])
        )
        assert alignment.check_caption(image, scene.caption).relation
        result = alignment.check_caption(image, caption)
        assert result.relation is False
        assert not result.aligned
        assert result.colours
        assert result.kinds


def test_noise_and_constant_images_are_not_aligned_with_any_caption():
    rng = np.random.default_rng(0)
    captions = [shapes.scene("train", i, "single").caption for i in range(50)]
    for caption in captions:
        noise = rng.normal(size=(32, 32, 3)).astype(np.float32)
        assert not alignment.check_caption(noise, caption).aligned
        assert not alignment.check_caption(
            np.full((32, 32, 3), rng.uniform(-1, 1)), caption
        ).aligned
    motley = np.full((32, 32, 3), -1.0)  # a square that is black in two thirds of each channel
    motley[8:20, 8:20] = np.eye(3)[np.arange(144) % 3].reshape(12, 12, 3) * 2 - 1
    assert [shape.colour for shape in alignment.find_shapes(motley)[1]] == [alignment.UNCLEAR]


def test_sizes_backgrounds_and_fragments_count_only_in_the_strict_criterion():
    """A wrong size, a wrong background and a fragment of 3 x 3 pixels are each detected."""
    sizes = backgrounds = fragments = 0
    for index in range(300):
        image, scene = shapes_example(index)
        words = scene.caption.split()
        changed = {"small": "large", "large": "small"}
        wrong = (
            [" ".join(changed.get(word, word) for word in words)] if scene.groups[0].size else []
        )
        if scene.background:
            taken = {scene.background_colour, *(group.colour for group in scene.groups)}
            other = next(name for name in shapes.BACKGROUNDS if name not in taken)
            old, new = (f"{name} background" for name in (scene.background, other))
            wrong.append(scene.caption.replace(old, new))
            backgrounds += 1
        sizes += bool(scene.groups[0].size)
        for caption in wrong:
            result = alignment.check_caption(image, caption)
            assert result.aligned_except_size_and_background
            assert not result.aligned, caption
        corners = [(r, c) for r in (1, 28) for c in (1, 28)]
        ground = image[0, 0]
        free = [
            p for p in corners if (image[p[0] - 1 : p[0] + 4, p[1] - 1 : p[1] + 4] == ground).all()
        ]
        if free:
            (row, column), changed_image = free[0], image.copy()
            colour = next(
                c
                for c in shapes.COLOURS.values()
                if np.ptp([c, (ground + 1) * 127.5], 0).max() > 120
            )
            changed_image[row : row + 3, column : column + 3] = np.array(colour) / 127.5 - 1
            result = alignment.check_caption(changed_image, scene.caption)
            assert result.aligned_except_size_and_background
            assert not result.aligned
            fragments += 1
    assert min(sizes, backgrounds, fragments) > 100
