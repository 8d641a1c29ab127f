"""Functions that write files; they replace files atomically and do not follow symbolic links."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from ddpm_jax.errors import UserError

SOFTWARE = "ddpm_jax"  # the text in files that this program has written and may replace
PNG_MARK = b"tEXtSoftware\0" + SOFTWARE.encode()
HEAD = 512  # a PNG file contains PNG_MARK within this number of first bytes


@contextlib.contextmanager
def open_atomic(path: pathlib.Path, durable: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file, which replaces `path` when the context ends without an error.

    If `path` is a symbolic link, the link is replaced, and the target of the link does not change.

    Args:
      path: Path of the file to replace or create.
      durable: Wait until the content is written to the disk (`fsync`).

    Raises:
      OSError: If the file cannot be written; `path` is then unchanged.
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
    """Append `content` to a file; if this fails, the file does not change.

    Raises:
      OSError: If the content cannot be written, or `path` is a symbolic link.
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
                os.truncate(file.fileno(), size)  # remove an incomplete line
            raise


def write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to a .npz file, with an entry `software`, which `has_our_mark` reads.

    Raises:
      OSError: If the file cannot be written.
    """
    entries: dict[str, Any] = {**arrays, "software": np.array(SOFTWARE)}
    with open_atomic(path) as file:
        np.savez_compressed(file, **entries)


def write_with(path: pathlib.Path, save: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically, and create the directory of the file if it does not exist.

    Args:
      path: Path of the file.
      save: Function that writes the content to an open file.

    Raises:
      OSError: If the file cannot be written.
    """
    path.parent.mkdir(exist_ok=True)
    with open_atomic(path) as file:
        save(file)


def has_our_mark(path: pathlib.Path) -> bool:
    """Return whether a .png or .npz file was written by this program."""
    try:
        if path.suffix.lower() == ".png":
            with path.open("rb") as file:
                return PNG_MARK in file.read(HEAD)
        with np.load(path, allow_pickle=False) as arrays:
            return str(arrays["software"]) == SOFTWARE
    except Exception:  # np.load raises errors of many types for other formats
        return False


def check_writable(directory: pathlib.Path, flag: str) -> None:
    """Check that files can be created in a directory, or in the nearest existing parent.

    Args:
      directory: The directory.
      flag: Flag and value for the error message, such as "--workdir=PATH".

    Raises:
      UserError: If files cannot be created.
    """
    reason = _unwritable_reason(directory)
    if reason:
        raise UserError(f"{flag}: cannot write to {directory}: {reason}; give another directory")


def is_writable(directory: pathlib.Path) -> bool:
    """Return whether files can be created in a directory, or in the nearest existing parent."""
    return not _unwritable_reason(directory)


def _unwritable_reason(directory: pathlib.Path) -> str:
    """Return the reason why files cannot be created, or an empty string if they can."""
    directory = directory.absolute()
    while not os.path.exists(directory) and directory != directory.parent:
        directory = directory.parent
    if not directory.is_dir():
        return f"{directory} is not a directory"
    writable = os.access(directory, os.W_OK | os.X_OK)
    return "" if writable else f"permission denied in {directory}"
