"""Functions that make image grids, plots and tables, and functions that write images to files."""

import bisect
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, ParamSpec

import numpy as np
from jaxtyping import Float, UInt8

from ddpm_jax.errors import NonFinite, printable
from ddpm_jax.fields import Json
from ddpm_jax.system.files import SOFTWARE, write_with

if TYPE_CHECKING:  # importing matplotlib is slow
    import matplotlib.axes
    import matplotlib.figure

P = ParamSpec("P")
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # matplotlib shows a box instead


def check_finite(images: Float[np.ndarray, "*batch"]) -> None:
    """Check that all values of the images are finite.

    Raises:
      NonFinite: If a value is NaN or infinite.
    """
    finite = np.isfinite(images)
    if not finite.all():
        count = images.size - np.count_nonzero(finite)
        raise NonFinite(f"{count} of {images.size} values of the images are non-finite (NaN, inf)")


def to_uint8(images: Float[np.ndarray, "*batch"]) -> UInt8[np.ndarray, "*batch"]:
    """Return images with values in [-1, 1] as integers 0 ... 255; other values are clipped.

    Raises:
      NonFinite: If a value is NaN or infinite. Without this check it would become a valid colour.
    """
    check_finite(images)
    levels = np.round((np.clip(images, -1, 1) + 1) * 127.5)
    return np.asarray(levels.astype(np.uint8))


def image_or_error(
    function: Callable[P, np.ndarray], *args: P.args, **kwargs: P.kwargs
) -> np.ndarray | NonFinite:
    """Return the image that `function` computes, or the `NonFinite` that `function` raises."""
    try:
        return function(*args, **kwargs)
    except NonFinite as error:
        return error


def grid(
    images: Float[np.ndarray, "n h w c"] | UInt8[np.ndarray, "n h w c"],
    columns: int | None = None,
    side: int = 56,
) -> UInt8[np.ndarray, "H W c"]:
    """Return one image, a grid of images that is filled row by row, with lines between the images.

    Args:
      images: Images with values in [-1, 1], or uint8 images with values in 0 ... 255.
      columns: Number of images in a row. If None, the grid has about as many columns as rows.
      side: Approximate minimum side of an image, in pixels. Smaller images are enlarged by an
        integer factor.

    Raises:
      NonFinite: If a value is NaN or infinite.
    """
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    zoom = max(1, round(side / max(height, width)))
    cells = images if images.dtype == np.uint8 else to_uint8(images)
    cells = cells.repeat(zoom, 1).repeat(zoom, 2)
    height, width = height * zoom, width * zoom
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 96, np.uint8)
    for index, cell in enumerate(cells):
        top = index // columns * (height + 2) + 2
        left = index % columns * (width + 2) + 2
        sheet[top : top + height, left : left + width] = cell
    return sheet


def captioned(
    rows: list[tuple[str, Float[np.ndarray, "n h w c"] | UInt8[np.ndarray, "n h w c"]]],
    side: int = 64,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return one image that shows rows of images, with a caption above each row.

    A caption that is wider than its row is shortened.

    Args:
      rows: For each row, the pair (caption, images), with images as in `grid`.
      side: Approximate minimum side of an image, in pixels, as in `grid`.

    Raises:
      NonFinite: If a value is NaN or infinite.
    """
    from PIL import Image, ImageDraw, ImageFont

    line_height, font, parts = 18, ImageFont.load_default(12), []
    for caption, images in rows:
        pixels = grid(images, columns=len(images), side=side)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        header = Image.new("RGB", (pixels.shape[1], line_height), "white")
        text = _shorten(caption, header.width - 6, font.getlength)
        ImageDraw.Draw(header).text((3, 2), text, "black", font)
        parts += [np.asarray(header), pixels]
    width = max(part.shape[1] for part in parts)
    return np.concatenate(
        [
            np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255)
            for part in parts
        ]
    )


def _shorten(caption: str, width: int, length: Callable[[str], float]) -> str:
    """Return a caption as a line of at most `width` pixels; `length(text)` is a width in pixels."""
    text = printable(" ".join(caption.split()))
    if len(text) <= width and length(text) <= width:
        return text
    text = text[:width]  # a letter has at least one pixel

    def pixels(count: int) -> int:
        return math.ceil(length(text[:count] + "..."))

    return text[: max(bisect.bisect(range(len(text)), width, key=pixels) - 1, 1)] + "..."


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Write a PNG file of a grey or colour image, with `files.SOFTWARE` in the file's metadata."""
    from PIL import Image, PngImagePlugin

    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("Software", SOFTWARE)
    png = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    write_with(path, lambda file: png.save(file, "png", pnginfo=metadata))


def save_gif(path: pathlib.Path, frames: UInt8[np.ndarray, "f h w c"]) -> None:
    """Write a GIF file that shows ten frames per second, and the last frame for two seconds."""
    from PIL import Image

    images = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    times = [100] * (len(images) - 1) + [2000]  # milliseconds
    first, *rest = images

    def save(file: IO[bytes]) -> None:
        first.save(file, "gif", save_all=True, append_images=rest, duration=times, loop=0)

    write_with(path, save)


def save_image(stem: pathlib.Path, image: np.ndarray) -> pathlib.Path:
    """Write an image [H, W, C] to STEM.png or an animation [F, H, W, C] to STEM.gif.

    `stem` is the path without a suffix. Return the path of the written file.
    """
    animation = image.ndim == 4
    path = stem.with_name(stem.name + (".gif" if animation else ".png"))
    (save_gif if animation else save_png)(path, image)
    return path


def read_lines(path: pathlib.Path) -> list[dict[str, Json]]:
    """Return the JSON object of each line of a file; return [] if the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(path: pathlib.Path, lines: Iterable[dict[str, Json]], title: str) -> None:
    """Write a plot of metrics over training steps: a panel per metric, with a curve per data split.

    If no metric has values at two or more training steps, the function writes no file.

    Args:
      path: Path of the PNG file.
      lines: Lines of `metrics.jsonl`: metrics by name, such as "train/loss", and the entry "step".
      title: Title of the plot.
    """
    from matplotlib.figure import Figure

    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            split, _, metric = name.partition("/")
            plotted = split in ("train", "validation", "test") and not is_error(name, line)
            if plotted and isinstance(value, (int, float)):
                points = series.setdefault(metric, {}).setdefault(split, [])
                points.append((line["step"], value))
    series = {m: s for m, s in series.items() if any(len(points) > 1 for points in s.values())}
    if not series:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    width, height = 4 * columns, 3 * rows
    figure = Figure(figsize=(width, height))
    # Margins in inches: matplotlib's automatic layout takes as long as plotting.
    figure.subplots_adjust(
        0.7 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.7 / height, wspace=0.25, hspace=0.4
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (metric, splits) in zip(axes.flat, series.items(), strict=False):
        for split, points in splits.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=split, marker="." if len(points) < 30 else None)
            late = [v for s, v in points if s >= 0.05 * points[-1][0]]
            if split == "train" and len(late) > 2:  # the first steps would dominate the scale
                axis.set_ylim(top=max(late) + 0.1 * (max(late) - min(late) or 1))
        axis.set_title(printable(metric), parse_math=False)
        axis.set_xlabel("step")
        axis.legend()
    for axis in axes.flat[len(series) :]:
        axis.remove()
    figure.suptitle(printable(title), parse_math=False)  # a user's text can contain "$"
    write_with(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def new_axis(
    width: float, height: float
) -> tuple["matplotlib.figure.Figure", "matplotlib.axes.Axes"]:
    """Return a new figure, whose width and height are in inches, and the only axes in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    figure.subplots_adjust(0.8 / width, 0.55 / height, 1 - 0.15 / width, 1 - 0.4 / height)
    return figure, figure.subplots()


def figure_pixels(figure: "matplotlib.figure.Figure") -> UInt8[np.ndarray, "h w c"]:
    """Return the RGB pixels of a figure, [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    return np.asarray(pixels)[..., :3].copy()


def lines(
    x: Float[np.ndarray, "points"], ys: dict[str, np.ndarray], xlabel: str, title: str
) -> UInt8[np.ndarray, "h w c"]:
    """Return the pixels of a plot of curves that have the same values of x.

    Args:
      x: Values of x.
      ys: Name of each curve in the legend, with the curve's values of y, [points].
      xlabel: Label of the x axis.
      title: Title of the plot.
    """
    figure, axis = new_axis(6.0, 4.0)
    for name, y in ys.items():
        axis.plot(x, y, ".-" if len(x) < 30 else "-", label=name)
    axis.set_xlabel(xlabel)
    axis.set_title(printable(title), parse_math=False)
    axis.legend()
    return figure_pixels(figure)


def paths(
    lines: dict[str, tuple[list[float], list[float], list[str]]],
    labels: tuple[str, str],
    title: str,
) -> UInt8[np.ndarray, "h w c"]:
    """Return the pixels of a plot of lines through points (x, y), with a label at each point.

    Args:
      lines: Name of each line in the legend, with (x values, y values, labels of the points).
      labels: Labels of the x axis and the y axis.
      title: Title of the plot.
    """
    figure, axis = new_axis(6.5, 4.5)
    for name, (x, y, point_labels) in lines.items():
        axis.plot(x, y, "o-", label=name)
        for label, x_i, y_i in zip(point_labels, x, y, strict=True):
            axis.annotate(label, (x_i, y_i), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(printable(title), parse_math=False)
    axis.margins(0.1)
    if len(lines) > 1:
        axis.legend()
    return figure_pixels(figure)


def table(rows: list[tuple[str, str]], title: str) -> str:
    """Return a table of two columns as text, with the title in the first line."""
    rows = [(printable(name), printable(value)) for name, value in rows]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join([printable(title), *lines])


def is_error(name: str, metrics: Iterable[str]) -> bool:
    """Return whether `name` is "X_error", the standard error of a metric X in `metrics`."""
    return name.endswith("_error") and name.removesuffix("_error") in metrics


def metric_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Return (name, text) of each metric; the text is "value" or "value +- standard error"."""
    rows = []
    for name, value in metrics.items():
        if is_error(name, metrics) or not isinstance(value, (int, float)):
            continue
        error = metrics.get(f"{name}_error")
        if error and 0 < error < math.inf:
            # The error has two digits, and the value as many decimals as the error.
            decimals = max(1 - math.floor(math.log10(error)), 0)
            text = f"{value:.{decimals}f} +- {error:.{decimals}f}"
            if decimals > 6:
                text = f"{value:.2g} +- {error:.1g}"
        else:
            text = f"{value:.4g}" if abs(value) < 100 else f"{value:.2f}"
        rows.append((name, text))
    return rows


def comparison_rows(
    runs: Mapping[str, dict[str, float]], names: Sequence[str], prefix: str = ""
) -> list[tuple[str, str]]:
    """Return (name, text) for each run, where the text lists the values of some metrics.

    Args:
      runs: Name of each run, or of each value that is compared, with its metrics.
      names: Names of the metrics in the text. A metric that a run does not have is omitted.
      prefix: Prefix of the metrics in `runs`, such as "test/", which the text omits.
    """
    rows = []
    for run, metrics in runs.items():
        texts = dict(metric_rows(metrics))
        listed = [f"{name} {texts[prefix + name]}" for name in names if prefix + name in texts]
        rows.append((run, "  ".join(listed)))
    return rows
