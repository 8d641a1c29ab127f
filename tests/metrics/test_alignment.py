"""The judge that reads the set of shapes back."""

import numpy as np
import pytest

from ddpm_jax.data import shapes
from ddpm_jax.metrics import alignment
from helpers.data_sets import picture


@pytest.mark.parametrize("side", shapes.SIDES)
def test_the_judge_reads_back_what_was_drawn(side):
    wrong = misplaced = 0
    for index in range(500):
        image, scene = picture(index, side=side)
        verdict = alignment.check_caption(image, scene.caption)
        wrong += not verdict.aligned
        behind, seen, strays = alignment.find_shapes(image)
        assert not strays
        assert behind == scene.behind
        found, drawn = (
            sorted((s.colour, s.kind, s.left, s.top) for s in some) for some in (seen, scene.shapes)
        )
        misplaced += len(found) != len(drawn) or any(
            a[:2] != b[:2] or np.abs(np.subtract(a[2:], b[2:])).max() > 1
            for a, b in zip(found, drawn, strict=True)
        )
    assert wrong <= 2  # 99.5 % right
    assert misplaced <= 2


def test_the_judge_of_another_caption_says_what_is_wrong():
    rightly = wrongly = 0
    for index in range(300):
        image, _ = picture(index)
        other = shapes.scene("train", index + 1)
        groups, relation, _ = alignment.parse(other.caption)
        here, there, _ = alignment.parse(shapes.scene("train", index).caption)
        looks = sorted((g.number, g.colour, g.kind) for g in groups)
        same = looks == sorted((g.number, g.colour, g.kind) for g in here)
        if same and relation is None:
            continue
        if not same:
            rightly += not alignment.check_caption(image, other.caption).aligned
            wrongly += alignment.check_caption(image, other.caption).aligned
        del there
    assert wrongly == 0
    assert rightly > 200


def test_a_relation_is_wrong_the_other_way_round():
    opposite = {"left": "right", "above": "below", "over": "under"}
    opposite |= {value: key for key, value in opposite.items()}
    for index in range(100):
        image, scene = picture(index, "any", "relation")
        turned = next(w for w in opposite if w in scene.relation)
        caption = scene.caption.replace(
            scene.relation, scene.relation.replace(turned, opposite[turned])
        )
        assert alignment.check_caption(image, scene.caption).relation
        verdict = alignment.check_caption(image, caption)
        assert verdict.relation is False
        assert not verdict.aligned
        assert verdict.colours
        assert verdict.kinds


def test_noise_and_flat_pictures_show_nothing():
    draws = np.random.default_rng(0)
    captions = [shapes.scene("train", i, "single").caption for i in range(50)]
    for caption in captions:
        noise = draws.normal(size=(32, 32, 3)).astype(np.float32)
        assert not alignment.check_caption(noise, caption).aligned
        assert not alignment.check_caption(
            np.full((32, 32, 3), draws.uniform(-1, 1)), caption
        ).aligned
    motley = np.full((32, 32, 3), -1.0)  # a square whose every channel is black in most of it
    motley[8:20, 8:20] = np.eye(3)[np.arange(144) % 3].reshape(12, 12, 3) * 2 - 1
    assert [shape.colour for shape in alignment.find_shapes(motley)[1]] == [alignment.UNCLEAR]


def test_alignment_is_strict_and_the_lenient_verdict_stands_beside_it():
    """A wrong size, a wrong background and a stray part of 3x3 pixels are each found."""
    sizes = backgrounds = strays = 0
    for index in range(300):
        image, scene = picture(index)
        words = scene.caption.split()
        changed = {"small": "large", "large": "small"}
        wrong = (
            [" ".join(changed.get(word, word) for word in words)] if scene.groups[0].size else []
        )
        if scene.background:
            taken = {scene.behind, *(group.colour for group in scene.groups)}
            other = next(name for name in shapes.BACKGROUNDS if name not in taken)
            old, new = (f"{name} background" for name in (scene.background, other))
            wrong.append(scene.caption.replace(old, new))
            backgrounds += 1
        sizes += bool(scene.groups[0].size)
        for caption in wrong:
            verdict = alignment.check_caption(image, caption)
            assert verdict.aligned_except_size_and_background
            assert not verdict.aligned, caption
        corners = [(r, c) for r in (1, 28) for c in (1, 28)]
        ground = image[0, 0]
        free = [
            p for p in corners if (image[p[0] - 1 : p[0] + 4, p[1] - 1 : p[1] + 4] == ground).all()
        ]
        if free:
            (row, column), stray = free[0], image.copy()
            colour = next(
                c
                for c in shapes.COLOURS.values()
                if np.ptp([c, (ground + 1) * 127.5], 0).max() > 120
            )
            stray[row : row + 3, column : column + 3] = np.array(colour) / 127.5 - 1
            verdict = alignment.check_caption(stray, scene.caption)
            assert verdict.aligned_except_size_and_background
            assert not verdict.aligned
            strays += 1
    assert min(sizes, backgrounds, strays) > 100
