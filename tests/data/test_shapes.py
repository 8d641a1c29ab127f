"""The data set of shapes with captions, and the byte tokenizer."""

import numpy as np
import pytest

from ddpm_jax.data import batches as batches_module
from ddpm_jax.data import loader, shape_negatives, shapes, types
from ddpm_jax.data.tokenizer import tokenize, untokenize
from ddpm_jax.errors import UserError
from ddpm_jax.metrics import alignment
from helpers.data_sets import shapes_example


def test_an_example_is_a_function_of_its_split_and_index_alone():
    data = loader.load("shapes")
    shapes.scene.cache_clear()
    rows = np.array([5, 3, 1000, 2**30])
    again = loader.load("shapes").train
    shapes.scene.cache_clear()
    np.testing.assert_array_equal(data.train.images[rows][::-1], again.images[rows[::-1]])
    np.testing.assert_array_equal(data.train.captions[rows][1], again.captions[rows[1:2]][0])
    assert not np.array_equal(data.train.images[rows[:1]], data.test.images[rows[:1]])
    assert data.fingerprint == loader.load("shapes").fingerprint


def test_endless_training_contains_no_example_twice():
    data = loader.load("shapes")
    plan = [(step, step + 1) for step in range(3)]
    batches = list(batches_module.training_batches(data.train, 0, 4, plan, None))
    expected = data.train.rows(batches_module.epoch_order(0, types.ENDLESS)(0, 12))
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), expected.images)
    np.testing.assert_array_equal(np.concatenate([b.captions for b in batches]), expected.captions)


def test_endless_training_is_a_function_of_seed_and_step():
    data = loader.load("shapes")

    def captions(seed, step):
        batch = next(batches_module.training_batches(data.train, seed, 8, [(step, step + 1)], None))
        return [text for text in untokenize(batch.captions)]

    assert captions(3, 5) == captions(3, 5)
    assert captions(3, 5) != captions(4, 5)
    assert captions(3, 5) != captions(3, 6)
    seeds = [*range(50), 2**31 - 1, 2**31, 2**32 - 1]
    firsts = [batches_module.epoch_order(seed, types.ENDLESS)(0, 1)[0] for seed in seeds]
    assert np.diff(np.sort(firsts)).min() > 0
    sampled = batches_module.epoch_order(1, types.ENDLESS)(0, types.ENDLESS // 1000 * 2)[:: 2**10]
    assert len(np.unique(sampled)) == len(sampled)
    last = batches_module.epoch_order(1, types.ENDLESS)(types.ENDLESS - 3, types.ENDLESS)
    assert np.array_equal((last + 3) % types.ENDLESS, firsts[1] + np.arange(3))


def test_shapes_are_separate_and_large_enough():
    for index in range(1000):
        scene = shapes.scene("train", index)
        for number, a in enumerate(scene.shapes):
            assert a.width >= 7
            assert min(a.left, a.top) >= 1
            assert max(a.left + a.width, a.top + a.width) <= 31
            for b in scene.shapes[:number]:
                distance = max(
                    b.left - a.left - a.width, a.left - b.left - b.width,
                    b.top - a.top - a.width, a.top - b.top - b.width,
                )  # fmt: skip
                assert distance >= 2 - 1e-9


def test_captions_fit_and_can_be_parsed():
    longest = 0
    for index in range(5000):
        scene = shapes.scene("train", index)
        longest = max(longest, len(scene.caption.encode()))
        assert alignment.parse(scene.caption) == (scene.groups, scene.relation, scene.background)
    assert 80 < longest <= shapes.LENGTH


@pytest.mark.slow
def test_held_out_pairs_do_not_occur_in_training():
    for index in range(100_000):
        pairs = {(shape.colour, shape.kind) for shape in shapes.scene("train", index).shapes}
        assert not pairs & shapes.ALL_HELD_OUT


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_pairs_occur_only_where_requested(split):
    held_out = shapes.HELD_OUT[split]
    for index in range(200):
        for only in ("single", "relation"):
            for held in ("", " held out"):
                scene = shapes.scene(f"{split} prompts", index, only + held)
                pairs = {(shape.colour, shape.kind) for shape in scene.shapes}
                assert bool(pairs & held_out) == bool(held)
                assert not pairs & (shapes.ALL_HELD_OUT - held_out)
                assert len(scene.shapes) == (1 if only == "single" else 2)
                assert (scene.relation is not None) == (only == "relation")
        pairs = {(s.colour, s.kind) for s in shapes.scene(split, index).shapes}
        assert bool(pairs & held_out) == bool(index % 2)
        assert not pairs & (shapes.ALL_HELD_OUT - held_out)


def test_validation_and_test_have_different_held_out_pairs_and_streams():
    assert not shapes.HELD_OUT["validation"] & shapes.HELD_OUT["test"]
    for words in ("", " prompts"):
        captions = [
            [shapes.scene(split + words, i, "relation").caption for i in range(50)]
            for split in ("train", "validation", "test")
        ]
        assert not any(a == b for t in zip(*captions, strict=True) for a, b in
                       [(t[0], t[1]), (t[1], t[2]), (t[0], t[2])])  # fmt: skip


def test_an_unsupported_size_is_an_error():
    with pytest.raises(UserError, match="32 or 64"):
        loader.load("shapes:33")


def test_untokenize_inverts_tokenize_and_texts_are_truncated_between_characters():
    texts = ["", "a red circle", "红色的圆", "🔴🔵", "é" * 10, "nul\0byte"]
    assert untokenize(tokenize(texts, 64)) == [text.replace("\0", "") for text in texts]
    assert untokenize(tokenize(["é" * 10, "🔴🔵", "abc"], 5)) == ["éé", "🔴", "abc"]
    assert tokenize(["x" * 10_000, "\ud800"], 16).shape == (2, 16)


def test_a_hard_negative_is_wrong_for_its_image_and_contains_no_held_out_pair():
    kinds = set()
    for index in range(300):
        image, scene = shapes_example(index)
        text = shape_negatives.hard_negative("train", index)
        assert text == shape_negatives.hard_negative("train", index)
        assert not alignment.check_caption(image, text).aligned
        groups, relation, background = alignment.parse(text)
        assert not {(g.colour, g.kind) for g in groups} & shapes.ALL_HELD_OUT
        assert sum(g.number for g in groups) <= 3  # the limit of every caption
        kinds |= {"relation"} if relation != scene.relation else set()
        kinds |= {"background"} if background != scene.background else set()
        kinds |= {
            field
            for a, b in zip(groups, scene.groups, strict=True)
            for field in a._fields
            if getattr(a, field) != getattr(b, field)
        }
    assert kinds == {"number", "size", "colour", "kind", "relation", "background"}
    assert shape_negatives.hard_negative("train", 0, 1) != shape_negatives.hard_negative("train", 0)


def test_hard_negatives_of_held_out_images_are_wrong():
    both = 0  # scenes with two held-out pairs, of which one change cannot remove both
    for index in range(1, 600, 2):
        image, scene = shapes_example(index, "test")
        pairs = {(group.colour, group.kind) for group in scene.groups}
        both += len(pairs & shapes.ALL_HELD_OUT) == 2
        text = shape_negatives.hard_negative("test", index)
        assert not alignment.check_caption(image, text).aligned
        groups = alignment.parse(text)[0]
        assert {(g.colour, g.kind) for g in groups} & shapes.ALL_HELD_OUT <= pairs
    assert both > 3
