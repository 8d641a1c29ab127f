"""A reader of PyTorch weight files that does not import PyTorch or run code in the files."""

import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import ml_dtypes
import numpy as np

from ddpm_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # first number in a file of the format before PyTorch 1.6
DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

Untrusted: TypeAlias = Any  # a value in the file, which may have any type until it is checked


class _Storage(NamedTuple):
    """A block of memory that one or several tensors use: `length` numbers of one type."""

    key: str
    type_name: str
    length: int


class _Tensor(NamedTuple):
    """The description of a tensor in the file: a part of a storage. It is not yet checked."""

    storage: Untrusted
    offset: Untrusted
    size: Untrusted
    stride: Untrusted


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict that `torch.save` wrote.

    The file is a zip archive, or a sequence of pickles, the format before PyTorch 1.6. A pickle in
    the file may only use the functions and types in `ALLOWED`, which return descriptions of
    tensors. An array is created after a check that it is entirely within its storage.

    Returns:
      A dictionary from names to read-only arrays, which may share memory. The dtype of bfloat16
      tensors is `ml_dtypes.bfloat16`.

    Raises:
      UserError: If the file cannot be read, is incomplete, or contains anything but a dict from
        names to tensors. Nested dicts and numbers are errors, too.
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        state_dict, data = (_zip if content.startswith(b"PK\3\4") else _stream)(content)
        if not isinstance(state_dict, dict):
            raise pickle.UnpicklingError(
                f"the file contains {_short(type(state_dict).__name__)}, not a dict"
            )
        tensors = {}
        for name, tensor in state_dict.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise pickle.UnpicklingError(f"the entry {_short(name)} is not a tensor")
            tensors[name] = _view(name, tensor, data)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a PyTorch state dict: {error}") from None
    except Exception as error:  # a pickle of random bytes can raise any exception
        reason = _short(f"{type(error).__name__}: {error}")
        raise UserError(f"{path} is not a PyTorch state dict, or is incomplete: {reason}") from None
    return tensors


def _zip(content: bytes) -> tuple[Untrusted, dict[str, bytes]]:
    """Return the object in data.pkl of a zip archive, and the bytes of each storage by key."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise pickle.UnpicklingError("the zip archive is compressed")
        if sum(member.file_size for member in members) > len(content):
            raise pickle.UnpicklingError("the members of the zip archive are larger than the file")
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("the file is a zip archive without data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("the byte order of the file is not little-endian")
        reader = _Unpickler(io.BytesIO(archive.read(pickles[0])))
        state_dict = reader.load()
        return state_dict, {key: archive.read(f"{root}data/{key}") for key in reader.storages}


def _stream(content: bytes) -> tuple[Untrusted, dict[str, bytes]]:
    """Return the object in a file of the older format, and the bytes of each storage by key.

    The file has five pickles: a magic number, a version, the system, the object, and the keys of
    the storages. After the pickles, each storage has its number of elements and its bytes.
    """
    stream = io.BytesIO(content)
    if _Unpickler(stream).load() != MAGIC or _Unpickler(stream).load() != 1001:
        raise pickle.UnpicklingError("the file does not start with the magic number and version")
    _Unpickler(stream).load()
    reader = _Unpickler(stream)
    state_dict = reader.load()
    data = {}
    for key in _Unpickler(stream).load():
        storage = reader.storages[key]
        (count,) = struct.unpack("<q", stream.read(8))
        if count != storage.length:
            raise pickle.UnpicklingError(
                f"the storage {_short(key)} has {count} elements, not {storage.length}"
            )
        data[key] = stream.read(count * DTYPES[storage.type_name].itemsize)
    return state_dict, data


def _view(name: str, tensor: _Tensor, data: dict[str, bytes]) -> np.ndarray:
    """Return the array that `tensor` describes, after a check that it is within its storage.

    `name` is the name of the tensor for error messages, `data` has the bytes of storages by key.
    """
    storage, offset, size, stride = tensor
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"the tensor {_short(name)} has no storage")
    dtype, content = DTYPES[storage.type_name], data[storage.key]
    if len(content) != storage.length * dtype.itemsize:
        raise pickle.UnpicklingError(
            f"the storage of the tensor {_short(name)} does not have the stated size"
        )
    valid = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not valid or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"the tensor {_short(name)} has an invalid shape")
    steps = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset + (steps + 1 if all(size) else 0) > storage.length:
        raise pickle.UnpicklingError(f"the tensor {_short(name)} is larger than its storage")
    if not all(size):
        return np.zeros(size, dtype)
    strides = [step * dtype.itemsize for step in stride]
    return np.ndarray(size, dtype, content, offset * dtype.itemsize, strides)


class _Ordered(dict[Untrusted, Untrusted]):
    """A dict that replaces OrderedDict in the file and ignores the attribute `_metadata`."""

    __slots__ = ()

    def __setstate__(self, state: Untrusted) -> None:
        pass


class _Call:
    """A function that a pickle can call, and whose attributes a pickle cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Untrusted]) -> None:
        self._function = function

    def __call__(self, *arguments: Untrusted) -> Untrusted:
        return self._function(*arguments)

    def __setstate__(self, state: Untrusted) -> NoReturn:
        raise pickle.UnpicklingError("a pickle in the file sets the state of a function")


def _rebuild_tensor(
    storage: Untrusted,
    offset: Untrusted,
    size: Untrusted,
    stride: Untrusted,
    requires_grad: Untrusted,
    hooks: Untrusted,
    metadata: Untrusted = None,
) -> _Tensor:
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: Untrusted, requires_grad: Untrusted, hooks: Untrusted) -> Untrusted:
    return tensor


ALLOWED: dict[tuple[str, str], _Call | str] = {
    ("collections", "OrderedDict"): _Call(_Ordered),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    **{("torch", name): name for name in DTYPES},
}


class _Unpickler(pickle._Unpickler):
    """An unpickler that creates only `_Tensor`, `_Ordered` and the built-in types of pickle.

    A pickle cannot use a class, and cannot change the state of the functions in `ALLOWED`. The base
    class is the Python implementation: the C implementation allocates as much memory as the file
    requests.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: Untrusted, name: Untrusted) -> _Call | str:
        """Return the entry of `ALLOWED` for a function or type that a pickle uses.

        Raises:
          UnpicklingError: If `ALLOWED` has no such entry.
        """
        if (module, name) not in ALLOWED:
            full = _short(f"{module}.{name}")
            raise pickle.UnpicklingError(f"the file uses {full}, which is not allowed")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Untrusted) -> _Storage:
        """Return the storage that `pid`, a persistent id in the pickle, describes.

        Raises:
          UnpicklingError: If `pid` does not describe a storage, or if it differs from an earlier
            description of the storage with the same key.
        """
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("the description of a storage is invalid")
        word, type_name, key, _, count = pid[:5]
        valid = isinstance(type_name, str) and type_name in DTYPES and isinstance(key, str)
        if word != "storage" or not valid or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("the description of a storage is invalid")
        storage = _Storage(key, type_name, count)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"the storage {_short(key)} is described in two ways")
        return storage


def _short(name: Untrusted) -> str:
    """Return the first 100 characters of a name in the file, for an error message."""
    return ascii(name if isinstance(name, str | int) else type(name).__name__)[:100]
