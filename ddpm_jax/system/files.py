"""Write files so that they appear whole or not at all, and never through a link."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from ddpm_jax.errors import UserError

SOFTWARE = "ddpm_jax"  # the mark in a file that this program may replace
PNG_MARK = b"tEXtSoftware\0" + SOFTWARE.encode()
HEAD = 512  # bytes of a PNG in which the mark is


@contextlib.contextmanager
def draft_of(path: pathlib.Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` once it is written.

    Whatever is at `path`, a link included, is replaced, not written to.

    Args:
      path: where the file appears.
      durable: wait until the content is on the disk.

    Raises:
      OSError: it cannot be written; what was there stays.
    """
    draft = path.with_name(f".{os.getpid()}.draft")
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()
    try:
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def append(path: pathlib.Path, content: bytes) -> None:
    """Append to a file, which is not a link; nothing of it where it cannot be written whole.

    Raises:
      OSError: it cannot be written.
    """
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(file.fileno(), size)  # no torn line before the next
            raise


def write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays with this program's mark, the entry `software`.

    Raises:
      OSError: it cannot be written.
    """
    entries: dict[str, Any] = {**arrays, "software": np.array(SOFTWARE)}
    with draft_of(path) as file:
        np.savez_compressed(file, **entries)


def write_with(path: pathlib.Path, save: Callable[[IO[bytes]], object]) -> None:
    """Write a file by `save`, which writes to an open one, in a folder that is made if needed.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    with draft_of(path) as file:
        save(file)


def is_ours(path: pathlib.Path) -> bool:
    """Return whether a .png or .npz has this program's mark."""
    try:
        if path.suffix.lower() == ".png":
            with path.open("rb") as file:
                return PNG_MARK in file.read(HEAD)
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays["software"]) == SOFTWARE
    except Exception:  # of many kinds: it is not such a file at all
        return False


def check_writable(folder: pathlib.Path, flag: str) -> None:
    """Check that files can be made in a folder, or in the nearest one above it that is there.

    Raises:
      UserError: they cannot.
    """
    reason = _refusal(folder)
    if reason:
        raise UserError(f"{flag}: cannot write to {folder}: {reason}; give another place")


def is_writable(folder: pathlib.Path) -> bool:
    """Return whether files can be made in a folder, or in the nearest one above it."""
    return not _refusal(folder)


def _refusal(folder: pathlib.Path) -> str:
    """Return why no files can be made in a folder; "" if they can."""
    place = folder.absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder"
    writable = os.access(place, os.W_OK | os.X_OK)
    return "" if writable else f"permission denied in {place}"
