"""Tests of image grids and tables of metrics."""

import time

import numpy as np
import pytest

from ddpm_jax import errors, plots


def test_a_grid_shows_the_images_row_by_row():
    images = np.linspace(-1, 1, 6).reshape(6, 1, 1, 1) * np.ones((1, 4, 4, 1))
    sheet = plots.grid(images, columns=3, side=4)
    assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 1)
    pixels = [sheet[4 + 6 * (i // 3), 4 + 6 * (i % 3), 0] for i in range(6)]
    assert pixels == list(np.round(np.linspace(0, 255, 6)).astype(np.uint8))


def test_a_table_shows_each_metric_and_its_error_in_one_row():
    metrics = {
        "test/fd": 5.731, "test/fd_error": 0.42, "test/absolute_error": 0.0312,
        "test/absolute_error_error": 0.0011, "test/bits_ode": 2.19, "test/bits_ode_error": 0.025,
        "test/bits_ode_numerical_error": 0.0003, "test/prior": 3.0e-9, "test/prior_error": 2e-11,
    }  # fmt: skip
    assert plots.metric_rows(metrics) == [
        ("test/fd", "5.73 +- 0.42"),
        ("test/absolute_error", "0.0312 +- 0.0011"),
        ("test/bits_ode", "2.190 +- 0.025"),
        ("test/bits_ode_numerical_error", "0.0003"),
        ("test/prior", "3e-09 +- 2e-11"),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_with_a_value_that_is_not_finite_raises_an_error(value):
    images = np.zeros((2, 4, 4, 1), np.float32)
    images[1, 2, 3, 0] = value
    for make in (plots.to_uint8, plots.grid, lambda images: plots.captioned([("a", images)])):
        with pytest.raises(errors.NonFinite, match="1 of 32 values"):
            make(images)


@pytest.mark.parametrize(
    "text",
    ["x " * 5000, "y" * 10_000, "日本語" * 3000, "\u0301" * 10_000, "a\0b\x1b[2J\n\u2028c", "",
     "\U0001f469\u200d\U0001f680" * 50, "שלום" * 1000, "\udcff" * 10_000],
)  # fmt: skip
def test_the_layout_of_a_text_of_any_length_takes_less_than_a_second(text):
    images = np.zeros((8, 16, 16, 3), np.float32)
    plots.captioned([("warm", images)])
    start = time.perf_counter()
    sheet = plots.captioned([(text, images)])
    assert time.perf_counter() - start < 1
    assert sheet.shape == plots.captioned([("short", images)]).shape


def test_a_long_text_is_cut_where_it_no_longer_fits():
    fits = plots._shorten("abcdefghij", 50, lambda text: 5.0 * len(text))
    assert fits == "abcdefghij"
    assert plots._shorten("abcdefghijk", 50, lambda text: 5.0 * len(text)) == "abcdefg..."
