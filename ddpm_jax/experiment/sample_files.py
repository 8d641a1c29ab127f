"""The file that `--mode=sample` writes: where it may be, and what it holds while it grows."""

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
from ddpm_jax.system.files import check_writable, is_ours, write_npz

SECONDS_BETWEEN_WRITES = 10.0  # at least, and at least ten times as long as writing takes
NO_LABEL = -1
WAITING = "waiting for the images that are being sampled; press Ctrl-C again to end at once"

STOPPED = "asked to stop by SIGTERM"


def check_out(out: pathlib.Path, default: pathlib.Path, overwrite: bool) -> None:
    """Check that samples can be written to `out` and destroy no file of somebody else's.

    Args:
      out: the file.
      default: the file within a run directory, which is this program's, and its folder made.
      overwrite: replace whatever file is there.

    Raises:
      UserError: they cannot, or would.
    """
    flag = f"--out={out}"
    if out.suffix.lower() not in (".png", ".npz"):
        raise UserError(f"{flag}: must end in .png or .npz")
    check_writable(out.parent, flag)
    try:
        if out != default and not out.parent.is_dir():
            raise UserError(f"{flag}: there is no folder {out.parent}")
        kind = out.lstat().st_mode
    except FileNotFoundError:
        kind = None
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {getattr(error, 'strerror', None) or error}") from None
    if kind is not None and not stat.S_ISREG(kind):
        names = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe"}
        name = names.get(stat.S_IFMT(kind), "a device")
        raise UserError(f"{flag} is {name}, not a file; give another --out")
    if kind is not None and out != default and not (overwrite or is_ours(out)):
        raise UserError(
            f"{flag} is there and was not written by this program; give another --out, or "
            "--overwrite to replace it"
        )


class SampleFile:
    """Images, as they are sampled, in a file that always holds the first ones.

    It appears whole: at first with what was sampled in some ten seconds, then again and again, and
    at the end with all of them.

    Args:
      out: a .png, of which a text is a row, or a .npz of `images` [N, H, W, C] in 0 ... 255,
        `labels` [N] (-1: none) and, if there are texts, `prompts` [N].
      texts: the prompts, or None alone.
      count: images of each text.
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
        """Add images in [-1, 1], and write the file if it is time.

        Raises:
          NonFinite: a value is not finite.
        """
        self._images.append(plots.to_uint8(images))
        none = np.full(len(images), NO_LABEL)
        self._labels.append((none if labels is None else labels).astype(np.int32))
        self.size += len(images)
        start = time.monotonic()
        if is_main() and self.size < self.total and start >= self._next:
            try:
                self.write()
            except OSError as error:
                log(f"cannot write {self._out}: {error.strerror}; it is tried again")
            taken = time.monotonic() - start
            self._next = start + taken + max(SECONDS_BETWEEN_WRITES, 10 * taken)

    def write(self) -> None:
        """Write what there is.

        Raises:
          OSError: it cannot be written.
        """
        images, labels = np.concatenate(self._images), np.concatenate(self._labels)
        if self._out.suffix.lower() == ".npz":
            arrays = {"images": images, "labels": labels}
            if self._prompts:
                which = np.arange(len(images)) // self._count
                arrays["prompts"] = np.array(self._prompts)[which]
            write_npz(self._out, arrays)
        elif not self._prompts:
            columns = math.ceil(math.sqrt(self.total))
            plots.save_png(self._out, plots.grid(images, columns=columns))
        else:
            rows = [images[at : at + self._count] for at in range(0, len(images), self._count)]
            shown = zip(self._prompts, rows, strict=False)  # of the last ones there is none yet
            plots.save_png(self._out, plots.captioned(list(shown)))

    @contextlib.contextmanager
    def kept(self) -> Iterator[Clock]:
        """Write what there is if sampling ends early; gives the clock that shows how far it is.

        SIGTERM and the first Ctrl-C wait for the images that are being sampled, the second Ctrl-C
        does not, and nor does SIGTERM where no images are there yet, as while the first program is
        compiled.

        Raises:
          RunError: the process was asked to stop.
          KeyboardInterrupt: by Ctrl-C.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            if self.size:  # or `notice` ends the process
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
            interrupts.watched(notice),
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
    try:
        before = signal.signal(number, handler)
    except ValueError:  # not in the main thread, which alone is signalled
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)
