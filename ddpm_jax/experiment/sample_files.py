"""The output file of `--mode=sample`, which is written repeatedly during sampling."""

import contextlib
import math
import pathlib
import signal
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import numpy as np
from jaxtyping import Float

from ddpm_jax import plots
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.parallel.processes import is_main
from ddpm_jax.progress import Clock, log
from ddpm_jax.system import interrupts
from ddpm_jax.system.files import check_writable, has_our_mark, write_npz

# The pause between writes is at least this, and at least ten times the duration of a write.
SECONDS_BETWEEN_WRITES = 10.0
NO_LABEL = -1  # label of an image without a class
WAITING = "waiting for the images that are being sampled; press Ctrl-C again to end at once"

STOPPED = "by SIGTERM"


def check_out(out: pathlib.Path, default: pathlib.Path, overwrite: bool) -> None:
    """Check that samples can be written to `out` without destroying a file of another program.

    Args:
      out: Output file.
      default: Default output file in the run directory, which is always replaced.
      overwrite: If true, any existing file is replaced.

    Raises:
      UserError: If the file cannot be written, or exists and was written by another program.
    """
    flag = f"--out={out}"
    if out.suffix.lower() not in (".png", ".npz"):
        raise UserError(f"{flag}: must end in .png or .npz")
    check_writable(out.parent, flag)
    try:
        if out != default and not out.parent.is_dir():
            raise UserError(f"{flag}: there is no folder {out.parent}; create it first")
        mode = out.lstat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {getattr(error, 'strerror', None) or error}") from None
    if mode is not None and not stat.S_ISREG(mode):
        names = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe"}
        name = names.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{flag} is {name}, not a file; give another --out")
    if mode is not None and out != default and not (overwrite or has_our_mark(out)):
        raise UserError(
            f"{flag} exists and was not written by this program; give another --out, or "
            "--overwrite to replace it"
        )


class SampleFile:
    """An output file of sampled images that is written repeatedly during sampling.

    Each write replaces the whole file, so that it always holds the images sampled so far. The first
    write is about ten seconds after the start, and the last one holds all images.

    Args:
      out: Output file. A .png is a grid, with one row for each prompt. A .npz holds `images`
        [N, H, W, C] in 0 ... 255, `labels` [N] (-1 if the images have no classes) and, if there are
        prompts, `prompts` [N].
      texts: The prompts, or (None,) if there are no prompts.
      count: Number of images of each prompt, or of all images if there are no prompts.
    """

    def __init__(self, out: pathlib.Path, texts: Sequence[str | None], count: int) -> None:
        self._out, self._count = out, count
        self._prompts = [text for text in texts if text is not None]
        self.total = count * len(texts)
        self.size = 0
        self._images: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._next = time.monotonic() + SECONDS_BETWEEN_WRITES

    def add(self, images: Float[np.ndarray, "n h w c"], labels: np.ndarray | None) -> None:
        """Add images in [-1, 1] and their labels [n]; write the file if the last write is long ago.

        Raises:
          NonFinite: If a value is not finite.
        """
        self._images.append(plots.to_uint8(images))
        no_labels = np.full(len(images), NO_LABEL)
        self._labels.append((no_labels if labels is None else labels).astype(np.int32))
        self.size += len(images)
        start = time.monotonic()
        if is_main() and self.size < self.total and start >= self._next:
            try:
                self.write()
            except OSError as error:
                log(f"cannot write {self._out}: {error.strerror}; the next write tries again")
            seconds = time.monotonic() - start
            self._next = start + seconds + max(SECONDS_BETWEEN_WRITES, 10 * seconds)

    def write(self) -> None:
        """Write all images sampled so far to the file.

        Raises:
          OSError: If the file cannot be written.
        """
        images, labels = np.concatenate(self._images), np.concatenate(self._labels)
        if self._out.suffix.lower() == ".npz":
            arrays = {"images": images, "labels": labels}
            if self._prompts:
                indices = np.arange(len(images)) // self._count
                arrays["prompts"] = np.array(self._prompts)[indices]
            write_npz(self._out, arrays)
        elif not self._prompts:
            columns = math.ceil(math.sqrt(self.total))
            plots.save_png(self._out, plots.grid(images, columns=columns))
        else:
            starts = range(0, len(images), self._count)
            rows = [images[start : start + self._count] for start in starts]
            captioned_rows = zip(self._prompts, rows, strict=False)  # the last prompts have no row
            plots.save_png(self._out, plots.captioned(list(captioned_rows)))

    @contextlib.contextmanager
    def write_on_exit(self) -> Iterator[Clock]:
        """Yield a progress clock; if the body ends early, write the images sampled so far.

        SIGTERM and the first Ctrl-C wait for the batch that is being sampled. The second Ctrl-C
        ends the process at once, as does SIGTERM before the first batch is sampled, for example
        during compilation.

        Raises:
          RunError: If the process received SIGTERM.
          KeyboardInterrupt: If the user pressed Ctrl-C.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            if self.size:  # otherwise `notice` ends the process
                raise RunError(STOPPED)

        def notice(number: int) -> None:
            if number == signal.SIGTERM and not self.size:
                interrupts.end_now(f"stopped: {STOPPED}", 1)
            warn(number)

        warn = interrupts.warning(lambda: log(WAITING), signal.SIGTERM, signal.SIGINT)
        clock = Clock(0, self.total, show=is_main(), unit="image")
        with (
            contextlib.closing(clock),
            _handled(signal.SIGTERM, stop),
            _handled(signal.SIGINT, signal.default_int_handler),
            interrupts.on_signals(notice),
        ):
            try:
                yield clock
            except BaseException:
                if self.size and is_main():
                    with contextlib.suppress(OSError):
                        self.write()
                        log(f"the first {self.size} of {self.total} images are in {self._out}")
                raise


@contextlib.contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Call `handler` for a signal during the body; have no effect outside the main thread."""
    try:
        before = signal.signal(number, handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)
