"""PyTorch's files of weights, read without PyTorch and without running what they hold."""

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

MAGIC = 0x1950A86A20F9469CFC6C  # of the older format, whose version is 1001
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


Stated: TypeAlias = Any  # what a file states: of whatever type, until it is checked


class _Storage(NamedTuple):
    """Bytes that tensors share: `length` elements of a type named as in `DTYPES`."""

    key: str
    kind: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, in elements, as the file states it: nothing is checked yet."""

    storage: Stated
    offset: Stated
    size: Stated
    stride: Stated


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors of a file that `torch.save` wrote of a state dict.

    Both formats are read: the zip archive, and the stream that PyTorch wrote before 1.6.  A
    pickle in them can name the few things below and no others, and makes only descriptions of
    tensors; a tensor is viewed once offset, size and strides lie within its storage.

    Returns:
      Arrays that may share memory and cannot be written to; bfloat16 is that of ml_dtypes.

    Raises:
      UserError: the file cannot be read, is truncated, or holds anything but a dict of names
        and tensors (a nested dict, a number: nothing is skipped).
    """
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        state_dict, data = (_zip if content.startswith(b"PK\3\4") else _stream)(content)
        if not isinstance(state_dict, dict):
            raise pickle.UnpicklingError(
                f"it holds {_short(type(state_dict).__name__)}, not a dict"
            )
        tensors = {}
        for name, tensor in state_dict.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise pickle.UnpicklingError(f"its {_short(name)} is not a tensor")
            tensors[name] = _view(name, tensor, data)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a PyTorch state dict: {error}") from None
    except Exception as error:  # a pickle of random bytes raises anything
        reason = _short(f"{type(error).__name__}: {error}")
        raise UserError(f"{path} is not a PyTorch state dict, or is incomplete: {reason}") from None
    return tensors


def _zip(content: bytes) -> tuple[Stated, dict[str, bytes]]:
    """Return what data.pkl describes, and the bytes of the storages that it names."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise pickle.UnpicklingError("it is compressed")
        if sum(member.file_size for member in members) > len(content):
            raise pickle.UnpicklingError("its parts are larger than the whole")
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("it is a zip archive with no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("its byte order is not little-endian")
        reader = _Unpickler(io.BytesIO(archive.read(pickles[0])))
        described = reader.load()
        return described, {key: archive.read(f"{root}data/{key}") for key in reader.storages}


def _stream(content: bytes) -> tuple[Stated, dict[str, bytes]]:
    """Return the same of the older format.

    Pickles of a magic number, a version, the system, the object and the storages' keys; then,
    of each key, how many elements and their bytes.
    """
    stream = io.BytesIO(content)
    if _Unpickler(stream).load() != MAGIC or _Unpickler(stream).load() != 1001:
        raise pickle.UnpicklingError("it does not start as one")
    _Unpickler(stream).load()
    reader = _Unpickler(stream)
    described = reader.load()
    data = {}
    for key in _Unpickler(stream).load():
        storage = reader.storages[key]
        (count,) = struct.unpack("<q", stream.read(8))
        if count != storage.length:
            raise pickle.UnpicklingError(f"its storage {_short(key)} has {count} elements")
        data[key] = stream.read(count * DTYPES[storage.kind].itemsize)
    return described, data


def _view(name: str, tensor: _Tensor, data: dict[str, bytes]) -> np.ndarray:
    """Return the array that `tensor` describes, of storages' bytes."""
    storage, offset, size, stride = tensor
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"its {_short(name)} has no storage")
    dtype, content = DTYPES[storage.kind], data[storage.key]
    if len(content) != storage.length * dtype.itemsize:
        raise pickle.UnpicklingError(
            f"the storage of its {_short(name)} does not have the stated size"
        )
    whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not whole or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"its {_short(name)} has no shape that could be")
    steps = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset + (steps + 1 if all(size) else 0) > storage.length:
        raise pickle.UnpicklingError(f"its {_short(name)} reaches beyond its storage")
    if not all(size):
        return np.zeros(size, dtype)
    strides = [step * dtype.itemsize for step in stride]
    return np.ndarray(size, dtype, content, offset * dtype.itemsize, strides)


class _Ordered(dict[Stated, Stated]):
    """Stands in for an OrderedDict, and forgets the `_metadata` that a module sets on it."""

    __slots__ = ()

    def __setstate__(self, state: Stated) -> None:
        pass


class _Call:
    """A function that a pickle may name and call, and change in nothing."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Stated]) -> None:
        self._function = function

    def __call__(self, *arguments: Stated) -> Stated:
        return self._function(*arguments)

    def __setstate__(self, state: Stated) -> NoReturn:
        raise pickle.UnpicklingError("it sets the state of a function")


def _rebuild_tensor(
    storage: Stated,
    offset: Stated,
    size: Stated,
    stride: Stated,
    requires_grad: Stated,
    hooks: Stated,
    metadata: Stated = None,
) -> _Tensor:
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: Stated, requires_grad: Stated, hooks: Stated) -> Stated:
    return tensor


ALLOWED: dict[tuple[str, str], _Call | str] = {
    ("collections", "OrderedDict"): _Call(_Ordered),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
    **{("torch", kind): kind for kind in DTYPES},
}


class _Unpickler(pickle._Unpickler):
    """Makes `_Tensor`s and `_Ordered`s of a pickle, beside what has an opcode of its own.

    No class is within a pickle's reach, and nothing that it reaches keeps a state.  It is the
    one written in Python, since the other's memo takes as much memory as a file asks for.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: Stated, name: Stated) -> _Call | str:
        """Return what a name of the file stands for.

        Raises:
          UnpicklingError: it is not allowed.
        """
        if (module, name) not in ALLOWED:
            full = _short(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it names {full}, which no tensor needs")
        return ALLOWED[module, name]

    def persistent_load(self, stated: Stated) -> _Storage:
        """Return the storage that a tensor of the file names.

        Raises:
          UnpicklingError: it is not one, or differs from an earlier one of the same key.
        """
        if not isinstance(stated, tuple) or len(stated) < 5 or stated[5:] not in ((), (None,)):
            raise pickle.UnpicklingError("a storage is not described as one")
        word, kind, key, _, count = stated[:5]
        right = isinstance(kind, str) and kind in DTYPES and isinstance(key, str)
        if word != "storage" or not right or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage is not described as one")
        storage = _Storage(key, kind, count)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"its storage {_short(key)} is described in two ways")
        return storage


def _short(stated: Stated) -> str:
    """Return at most 100 printable characters of a name in a file, for one line."""
    return ascii(stated if isinstance(stated, str | int) else type(stated).__name__)[:100]
