"""The reader of PyTorch files, with valid, damaged and malicious files."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.metrics.pth import MAGIC, read_tensors

# State dicts written as opcodes of pickle, so that these tests need no PyTorch.

NUMBERS = np.arange(6, dtype="<f4")


def literal(value):
    return pickle.dumps(value, 2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def called(module, name, *arguments):
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def storage(*last, key="0", kind="FloatStorage", length=6, word="storage"):
    rest = (literal(key), literal("cpu"), literal(length), *map(literal, last))
    return b"(" + literal(word) + named("torch", kind) + b"".join(rest) + b"tQ"


def tensor(stored, offset=0, size=(2, 3), stride=(3, 1)):
    parts = (stored, *map(literal, (offset, size, stride, False)))
    return called(
        "torch._utils", "_rebuild_tensor_v2", *parts, called("collections", "OrderedDict")
    )


def state_dict(*values):
    items = b"".join(literal(f"w{i}") + value + b"s" for i, value in enumerate(values))
    return b"}" + items


def zipped(path, pickled, data=None, compression=zipfile.ZIP_STORED):
    data = {"0": NUMBERS.tobytes()} if data is None else data
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        for key, content in data.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def streamed(path, pickled, length=6):
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
    tail = pickle.dumps(["0"], 2) + struct.pack("<q", length) + NUMBERS.tobytes()
    path.write_bytes(head + b"\x80\x02" + pickled + b"." + tail)
    return path


WRITERS = pytest.mark.parametrize("write", [zipped, streamed])


def refused(path, *words):
    """Check that reading a file raises a UserError of one line with certain words."""
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert all(word in message for word in (str(path), *words)), message


@WRITERS
def test_a_file_of_pickle_opcodes_is_read(tmp_path, write):
    last = (None,) if write is streamed else ()
    whole = tensor(storage(*last))
    transposed = tensor(storage(*last), 1, (2, 2), (1, 3))
    parameter = called("torch._utils", "_rebuild_parameter", whole, literal(True), b"N")
    tensors = read_tensors(write(tmp_path / "it.pth", state_dict(whole, transposed, parameter)))
    np.testing.assert_array_equal(tensors["w0"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(tensors["w1"], [[1, 4], [2, 5]])
    np.testing.assert_array_equal(tensors["w2"], tensors["w0"])
    assert tensors["w0"].dtype == np.float32
    assert not tensors["w0"].flags.writeable


@WRITERS
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch.serialization", "load"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ],
)
def test_a_file_cannot_run_code(tmp_path, write, module, name):
    mark = tmp_path / "mark"
    run = called(module, name, literal(f"touch {mark}"))
    for pickled in (run, run + b"0" + state_dict(), state_dict(run), state_dict(tensor(run))):
        refused(write(tmp_path / "it.pth", pickled), f"{module}.{name}")
    assert not mark.exists()


def test_every_opcode_that_names_a_function_is_refused(tmp_path):
    mark = tmp_path / "mark"
    command = literal(f"touch {mark}")
    ways = [
        literal("os") + literal("system") + b"\x93" + command + b"\x85R",  # STACK_GLOBAL
        b"(" + command + b"ios\nsystem\n",  # INST
        b"(" + named("os", "system") + command + b"o",  # OBJ
        named("subprocess", "Popen") + command + b"\x85\x81",  # NEWOBJ
        named("subprocess", "Popen") + command + b"\x85}\x92",  # NEWOBJ_EX
        b"\x82\x01",  # EXT1
        b"\x97",  # NEXT_BUFFER
    ]
    words = ["os.system"] * 3 + ["subprocess.Popen"] * 2 + ["unregistered", "buffer"]
    for way, word in zip(ways, words, strict=True):
        refused(zipped(tmp_path / "it.pth", way), word)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "OrderedDict"),
        ("torch", "FloatStorage"),
    ],
)
def test_a_file_cannot_change_the_functions_that_it_may_call(tmp_path, module, name):
    allowed = named(module, name)
    for state in ({"_function": "x"}, (None, {"_function": "x", "__call__": "x"})):
        refused(zipped(tmp_path / "it.pth", allowed + literal(state) + b"b0" + state_dict()))
        changed = tensor(storage()) + literal(state) + b"b"
        refused(zipped(tmp_path / "it.pth", state_dict(changed)))
    refused(zipped(tmp_path / "it.pth", allowed + b")\x81"))  # NEWOBJ
    read_tensors(zipped(tmp_path / "it.pth", state_dict(tensor(storage()))))


def test_the_metadata_of_a_module_is_ignored(tmp_path):
    ordered = called("collections", "OrderedDict") + literal("w0") + tensor(storage()) + b"s"
    about = literal({"_metadata": {"": {"version": 1}}, "__class__": 5, "items": None}) + b"b"
    assert set(read_tensors(zipped(tmp_path / "it.pth", ordered + about))) == {"w0"}


OUTSIDE = [
    {"offset": 1},
    {"offset": 7, "size": (), "stride": ()},
    {"offset": 7, "size": (0,), "stride": (1,)},
    {"offset": -1},
    {"offset": 2**62},
    {"offset": "0"},
    {"offset": 0.0},
    {"size": (3, 3)},
    {"size": (2, -3)},
    {"size": (2, 2**62)},
    {"size": (2**40, 2**40), "stride": (0, 0)},
    {"size": (2.0, 3)},
    {"size": (True, 3)},
    {"size": 6},
    {"size": [2, 3]},
    {"stride": (4, 1)},
    {"stride": (-3, 1)},
    {"stride": (2**62, 1)},
    {"stride": (1,)},
    {"stride": None},
    {"size": (1,) * 100, "stride": (1,) * 100},
]


@WRITERS
@pytest.mark.parametrize("view", OUTSIDE, ids=str)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, write, view):
    refused(write(tmp_path / "it.pth", state_dict(tensor(storage(), **view))))


@WRITERS
@pytest.mark.parametrize(
    "stated",
    [
        {"length": 7},
        {"length": 5},
        {"length": -1},
        {"length": 2**62},
        {"length": None},
        {"kind": "DoubleStorage"},
        {"kind": "UntypedStorage"},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": 0},
        {"word": "module"},
    ],
    ids=str,
)
def test_a_storage_that_differs_from_its_description_is_refused(tmp_path, write, stated):
    refused(write(tmp_path / "it.pth", state_dict(tensor(storage(**stated)))))
    two = state_dict(tensor(storage()), tensor(storage(**stated)))
    refused(write(tmp_path / "it.pth", two))


def test_two_descriptions_of_one_storage_are_refused(tmp_path):
    path = tmp_path / "it.pth"
    two = state_dict(tensor(storage()), tensor(storage(kind="IntStorage")))
    refused(zipped(path, two), "described in two ways")
    refused(streamed(path, state_dict(tensor(storage())), length=5), "has 5 elements")


def test_a_persistent_id_of_anything_but_a_storage_is_refused(tmp_path):
    for pickled in (b"Pos.system\n", literal(("storage",)) + b"Q", literal([1]) + b"Q", b"NQ"):
        refused(zipped(tmp_path / "it.pth", state_dict(pickled)), "storage")
    viewed = storage(("1", 0, 2**40))  # a view of a view, as PyTorch before 0.4 wrote it
    refused(streamed(tmp_path / "it.pth", state_dict(tensor(viewed))), "storage")
    refused(zipped(tmp_path / "it.pth", state_dict(tensor(literal("0")))), "w0", "no storage")


def test_an_entry_that_is_not_a_tensor_is_refused_by_name(tmp_path):
    path = tmp_path / "it.pth"
    refused(zipped(path, tensor(storage())), "not a dict")
    refused(zipped(path, state_dict(literal(5))), "'w0' is not a tensor")
    refused(zipped(path, state_dict(state_dict(tensor(storage())))), "'w0' is not a tensor")
    refused(zipped(path, b"}" + literal(5) + tensor(storage()) + b"s"), "5 is not a tensor")
    refused(zipped(path, state_dict(storage())), "'w0' is not a tensor")
    long = literal("line\n" * 1000) + b"N" + b"s"
    refused(zipped(path, b"}" + long), "is not a tensor")


def test_a_file_cannot_allocate_more_memory_than_its_size(tmp_path):
    path = tmp_path / "it.pth"
    lots = b"N" + b"r\xff\xff\xff\xff" + b"0" + state_dict()  # LONG_BINPUT
    assert read_tensors(zipped(path, lots)) == {}
    refused(zipped(path, b"\x8e" + struct.pack("<Q", 2**61) + b"x"))  # BINBYTES8
    whole = state_dict(tensor(storage()))
    refused(zipped(path, whole, compression=zipfile.ZIP_DEFLATED), "compressed")
    with zipfile.ZipFile(zipped(path, whole), "a") as archive:
        archive.writestr("last", b"x" * 1000)
        archive.filelist.extend([archive.filelist[-1]] * 100)  # the same bytes, listed again
    refused(path, "larger than the file")


@WRITERS
def test_every_truncated_file_is_refused_in_one_line(tmp_path, write):
    path = write(tmp_path / "it.pth", state_dict(tensor(storage())))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


@WRITERS
def test_a_damaged_file_is_read_or_refused(tmp_path, write):
    path = write(
        tmp_path / "it.pth", state_dict(tensor(storage()), tensor(storage(), 2, (2,), (1,)))
    )
    content = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = content.copy()
        damaged[rng.integers(0, len(content), 2)] = rng.integers(0, 256, 2)
        path.write_bytes(damaged.tobytes())
        try:
            read_tensors(path)
            message = ""
        except UserError as error:
            message = str(error)
        assert "\n" not in message


def test_a_file_that_is_not_a_pth_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "it.pth"
    refused(path, "cannot be read")
    refused(tmp_path, "cannot be read")
    for seed in range(50):
        path.write_bytes(np.random.default_rng(seed).bytes(200))
        refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "without data.pkl")
    path.write_bytes(pickle.dumps({"w": 1}))
    refused(path, "does not start with the magic number")


# Tests with PyTorch.

FORMATS = pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "stream"])


@FORMATS
def test_a_state_dict_of_every_type_is_read(tmp_path, zip_format):
    torch = pytest.importorskip("torch")
    floats = ["float32", "float64", "float16", "bfloat16"]
    types = [*floats, "int64", "int32", "int16", "int8", "uint8", "bool"]
    numbers = torch.arange(24).reshape(2, 3, 4)
    state = {name: (numbers % 5).to(getattr(torch, name)) for name in types}
    whole = torch.randn(4, 6)
    state |= {
        "whole": whole,
        "transposed": whole.T,
        "part": whole[1:3, ::2],
        "expanded": whole[:, :1].expand(4, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole[2]),
    }
    path = tmp_path / "it.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zip_format)
    tensors = read_tensors(path)
    assert list(tensors) == list(state)
    for name, value in state.items():
        expected = value.detach()
        if name == "bfloat16":
            assert tensors[name].dtype == ml_dtypes.bfloat16
            tensors[name], expected = tensors[name].astype(np.float32), expected.float()
        assert tensors[name].dtype == expected.numpy().dtype, name
        np.testing.assert_array_equal(tensors[name], expected.numpy(), err_msg=name)
    assert np.shares_memory(tensors["whole"], tensors["part"])


@FORMATS
def test_a_modules_state_dict_is_read_whatever_the_pickle_protocol(tmp_path, zip_format):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = net.state_dict()  # an OrderedDict that carries `_metadata`
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pth"
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zip_format}
        torch.save(state, path, **options)
        tensors = read_tensors(path)
        assert list(tensors) == list(state)
        for name, value in state.items():
            np.testing.assert_array_equal(tensors[name], value.numpy(), err_msg=name)


def test_a_saved_module_or_checkpoint_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "it.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, "Linear")
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict(), "epoch": 3}, path)
    refused(path, "state_dict")
