"""Pictures, curves and tables."""

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

if TYPE_CHECKING:  # it takes long to import
    import matplotlib.axes
    import matplotlib.figure

P = ParamSpec("P")
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn for it


def check_finite(images: Float[np.ndarray, "*batch"]) -> None:
    """Check that all values of the images are finite.

    Raises:
      NonFinite: some are not.
    """
    finite = np.isfinite(images)
    if not finite.all():
        wrong = images.size - np.count_nonzero(finite)
        raise NonFinite(f"{wrong} of {images.size} values of the images are non-finite (NaN, inf)")


def to_uint8(images: Float[np.ndarray, "*batch"]) -> UInt8[np.ndarray, "*batch"]:
    """Return images of [-1, 1] as 0 ... 255, clipped.

    Raises:
      NonFinite: a value is not finite: it would be black, as a real one may be.
    """
    check_finite(images)
    levels = np.round((np.clip(images, -1, 1) + 1) * 127.5)
    return np.asarray(levels.astype(np.uint8))


def attempt(
    make: Callable[P, np.ndarray], *arguments: P.args, **named: P.kwargs
) -> np.ndarray | NonFinite:
    """Return the picture that `make` makes, or in its place the error that there is none."""
    try:
        return make(*arguments, **named)
    except NonFinite as error:
        return error


def grid(
    images: Float[np.ndarray, "n h w c"] | UInt8[np.ndarray, "n h w c"],
    columns: int | None = None,
    side: int = 56,
) -> UInt8[np.ndarray, "H W c"]:
    """Return images in rows, from the top left, with lines between them.

    Args:
      images: in [-1, 1], or in 0 ... 255 if they are uint8.
      columns: how many in a row; as many as rows by default.
      side: small images are enlarged, pixel by pixel, to at least about this many pixels.

    Raises:
      NonFinite: a value is not finite.
    """
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    zoom = max(1, round(side / max(height, width)))
    cells = images if images.dtype == np.uint8 else to_uint8(images)
    cells = cells.repeat(zoom, 1).repeat(zoom, 2)
    height, width = height * zoom, width * zoom
    sheet = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, channels), 96, np.uint8)
    for number, cell in enumerate(cells):
        top = number // columns * (height + 2) + 2
        left = number % columns * (width + 2) + 2
        sheet[top : top + height, left : left + width] = cell
    return sheet


def captioned(
    rows: list[tuple[str, Float[np.ndarray, "n h w c"] | UInt8[np.ndarray, "n h w c"]]],
    side: int = 64,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return rows of images, each below its text, which is cut to their width.

    Args:
      rows: texts, and images as in `grid`.
      side: as in `grid`.

    Raises:
      NonFinite: a value is not finite.
    """
    from PIL import Image, ImageDraw, ImageFont

    line, font, parts = 18, ImageFont.load_default(12), []
    for words, images in rows:
        pixels = grid(images, columns=len(images), side=side)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        head = Image.new("RGB", (pixels.shape[1], line), "white")
        text = _cut(words, head.width - 6, font.getlength)
        ImageDraw.Draw(head).text((3, 2), text, "black", font)
        parts += [np.asarray(head), pixels]
    wide = max(part.shape[1] for part in parts)
    return np.concatenate(
        [
            np.pad(part, ((0, 0), (0, wide - part.shape[1]), (0, 0)), constant_values=255)
            for part in parts
        ]
    )


def _cut(words: str, width: int, length: Callable[[str], float]) -> str:
    """Return a text in one line, and what of it fits into so many pixels.

    Args:
      length: of a text, in pixels.
    """
    text = printable(" ".join(words.split()))
    if len(text) <= width and length(text) <= width:
        return text
    text = text[:width]  # no more letters than pixels

    def pixels(count: int) -> int:
        return math.ceil(length(text[:count] + "..."))

    return text[: max(bisect.bisect(range(len(text)), width, key=pixels) - 1, 1)] + "..."


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Write a grey or colour picture, with this program's mark."""
    from PIL import Image, PngImagePlugin

    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    write_with(path, lambda file: picture.save(file, "png", pnginfo=about))


def save_gif(path: pathlib.Path, frames: UInt8[np.ndarray, "f h w c"]) -> None:
    """Write a animation of ten frames a second, whose last frame stays for two."""
    from PIL import Image

    pictures = [
        Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames
    ]
    times = [100] * (len(pictures) - 1) + [2000]
    first, *others = pictures

    def save(file: IO[bytes]) -> None:
        first.save(file, "gif", save_all=True, append_images=others, duration=times, loop=0)

    write_with(path, save)


def save_image(stem: pathlib.Path, image: np.ndarray) -> pathlib.Path:
    """Write a picture [H, W, C] as STEM.png, or a animation [F, H, W, C] as STEM.gif."""
    animation = image.ndim == 4
    path = stem.with_name(stem.name + (".gif" if animation else ".png"))
    (save_gif if animation else save_png)(path, image)
    return path


def read_lines(path: pathlib.Path) -> list[dict[str, Json]]:
    """Return the lines of a .jsonl file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(path: pathlib.Path, lines: Iterable[dict[str, Json]], title: str) -> None:
    """Draw one panel for each metric over steps, with every split in the same."""
    from matplotlib.figure import Figure

    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            split, _, metric = name.partition("/")
            known = split in ("train", "validation", "test") and not is_error(name, line)
            if known and isinstance(value, (int, float)):
                points = series.setdefault(metric, {}).setdefault(split, [])
                points.append((line["step"], value))
    series = {m: s for m, s in series.items() if any(len(points) > 1 for points in s.values())}
    if not series:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    wide, high = 4 * columns, 3 * rows
    figure = Figure(figsize=(wide, high))
    # Margins in inches: to measure them by what is drawn takes as long as to draw.
    figure.subplots_adjust(
        0.7 / wide, 0.5 / high, 1 - 0.1 / wide, 1 - 0.7 / high, wspace=0.25, hspace=0.4
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (metric, splits) in zip(axes.flat, series.items(), strict=False):
        for split, points in splits.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=split, marker="." if len(points) < 30 else None)
            late = [v for s, v in points if s >= 0.05 * points[-1][0]]
            if split == "train" and len(late) > 2:  # the first steps would flatten the rest
                axis.set_ylim(top=max(late) + 0.1 * (max(late) - min(late) or 1))
        axis.set_title(printable(metric), parse_math=False)
        axis.set_xlabel("step")
        axis.legend()
    for axis in axes.flat[len(series) :]:
        axis.remove()
    figure.suptitle(printable(title), parse_math=False)  # which a stranger may have named
    write_with(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def new_axis(wide: float, high: float) -> tuple["matplotlib.figure.Figure", "matplotlib.axes.Axes"]:
    """Return a figure of so many inches, and its only axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), dpi=100)
    figure.subplots_adjust(0.8 / wide, 0.55 / high, 1 - 0.15 / wide, 1 - 0.4 / high)
    return figure, figure.subplots()


def figure_pixels(figure: "matplotlib.figure.Figure") -> UInt8[np.ndarray, "h w c"]:
    """Return a figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    return np.asarray(pixels)[..., :3].copy()


def lines(
    x: Float[np.ndarray, "points"], ys: dict[str, np.ndarray], xlabel: str, title: str
) -> UInt8[np.ndarray, "h w c"]:
    """Return curves over one axis, as a picture.

    Args:
      x: of every point.
      ys: the curves by their names.
      xlabel: of the axis.
      title: of the picture.
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
    """Return a plot of lines through points (x, y), each point with its word beside it."""
    figure, axis = new_axis(6.5, 4.5)
    for name, (x, y, words) in lines.items():
        axis.plot(x, y, "o-", label=name)
        for word, *place in zip(words, x, y, strict=True):
            axis.annotate(
                word, (place[0], place[1]), xytext=(5, 4), textcoords="offset points", fontsize=8
            )
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(printable(title), parse_math=False)
    axis.margins(0.1)
    if len(lines) > 1:
        axis.legend()
    return figure_pixels(figure)


def table(rows: list[tuple[str, str]], title: str) -> str:
    """Return a table of two columns under a title, each row in one line."""
    rows = [(printable(name), printable(value)) for name, value in rows]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join([printable(title), *lines])


def is_error(name: str, metrics: Iterable[str]) -> bool:
    """Return whether a metric is the standard error of another one."""
    return name.endswith("_error") and name.removesuffix("_error") in metrics


def metric_rows(metrics: dict[str, float]) -> list[tuple[str, str]]:
    """Return metrics as a table shows them, each with its standard error where there is one."""
    rows = []
    for name, value in metrics.items():
        if is_error(name, metrics) or not isinstance(value, (int, float)):
            continue
        error = metrics.get(f"{name}_error")
        if error and 0 < error < math.inf:  # two digits of it, and as many of the value
            places = max(1 - math.floor(math.log10(error)), 0)
            text = f"{value:.{places}f} +- {error:.{places}f}"
            if places > 6:
                text = f"{value:.2g} +- {error:.1g}"
        else:
            text = f"{value:.4g}" if abs(value) < 100 else f"{value:.2f}"
        rows.append((name, text))
    return rows


def comparison_rows(
    runs: Mapping[str, dict[str, float]], names: Sequence[str], prefix: str = ""
) -> list[tuple[str, str]]:
    """Return a row of chosen metrics for each run or setting that a table compares.

    Args:
      runs: metrics by the row's name.
      names: of the metrics; those that a run does not have are left out.
      prefix: of the metrics' names, such as "test/", which the table does not show.
    """
    rows = []
    for run, metrics in runs.items():
        texts = dict(metric_rows(metrics))
        shown = [f"{name} {texts[prefix + name]}" for name in names if prefix + name in texts]
        rows.append((run, "  ".join(shown)))
    return rows
