"""Data sets: order and batches, digits, validation splits, folders and files of TFDS."""

import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import batches as batches_module
from ddpm_jax.data import cache as cache_module
from ddpm_jax.data import loader, splits, types
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.data.tokenizer import untokenize
from ddpm_jax.errors import UserError

# Order.


def test_every_epoch_shows_every_example_once():
    rows = batches_module.epoch_order(seed=3, size=10)
    seen = np.concatenate([rows(step * 4, step * 4 + 4) for step in range(10)])  # 4 epochs
    for epoch in seen.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:20])


def test_order_is_a_function_of_seed_and_step_alone():
    order = batches_module.epoch_order(seed=3, size=10)(0, 40)
    later = batches_module.epoch_order(seed=3, size=10)
    for start in (36, 8, 20, 0):  # in any order, by a new function
        assert np.array_equal(later(start, start + 4), order[start : start + 4])
    assert not np.array_equal(batches_module.epoch_order(seed=4, size=10)(0, 40), order)


def test_a_batch_may_be_larger_than_the_data():
    assert len(batches_module.epoch_order(seed=0, size=3)(5, 25)) == 20


def split(size):
    images = np.arange(size, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return types.Split(images, np.arange(size, dtype=np.int32))


def test_stacked_batches_contain_the_single_batches():
    plan = [(0, 3), (3, 4), (4, 7)]
    single = batches_module.training_batches(split(50), 0, 8, [(i, i + 1) for i in range(7)], None)
    singles = list(single)
    for (first, last), batch in zip(
        plan, batches_module.training_batches(split(50), 0, 8, plan, 3), strict=True
    ):
        assert batch.images.shape == (3, 8, 1, 1, 1)
        for step in range(first, last):
            assert np.array_equal(batch.images[step - first], singles[step].images)
            assert np.array_equal(batch.labels[step - first], batch.images[step - first].ravel())
            assert np.array_equal(batch.index[step - first], np.arange(8))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_evaluation_batches_contain_every_example_once(batch_size):
    seen = []
    for batch, count in batches_module.evaluation_batches(split(10), batch_size):
        assert len(batch.images) == batch_size
        seen += list(batch.index[:count])
    assert seen == list(range(10))


def test_prefetching_preserves_batches_and_raises_their_errors():
    assert list(prefetch(iter(range(50)), lambda x: x * 2)) == list(range(0, 100, 2))

    def breaks():
        yield 1
        raise OSError("the disk has failed")

    batches = prefetch(breaks(), lambda x: x)
    assert next(batches) == 1
    with pytest.raises(OSError, match="the disk has failed"):
        next(batches)


# Digits.


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = loader.load("digits", validation=0)
    images, labels = load_digits(return_X_y=True)
    together = np.concatenate([data.test.images, data.train.images]).reshape(-1, 64)
    order = batches_module.permutation(0, 0, 1797)
    assert np.array_equal(together, images[order])
    assert np.array_equal(np.concatenate([data.test.labels, data.train.labels]), labels[order])
    assert data.levels == 17
    assert together.max() == 16


def test_the_description_of_resized_digits_names_digits_and_size():
    data = loader.load("digits:28")
    assert data.shape == (28, 28, 1)
    assert "28x28" in data.title
    assert "digits" in data.title
    assert "MNIST" not in str(data.describe())


# Validation.


def numbered(size, validation=None):
    """Return a data set whose images and labels are their indices."""

    def split(numbers):
        images = np.array(numbers, np.int64).view(np.uint8).reshape(-1, 8, 1, 1)
        return types.Split(images, np.array(numbers, np.int32))

    held_out = None if validation is None else split(range(-validation, 0))
    return types.Data("numbers", "numbers", split(range(size)), split(range(size, size + 3)), 256,
                       (), "", validation=held_out)  # fmt: skip


@pytest.mark.parametrize(
    ("size", "requested", "count"),
    [
        (2, None, 1),
        (9, None, 1),
        (1437, None, 143),
        (60_000, None, 5_000),
        (100, 7, 7),
        (100, 99, 99),
    ],
)
def test_a_fixed_seed_moves_training_images_to_the_validation_split(size, requested, count):
    data = splits.with_validation(numbered(size), requested)
    assert len(data.validation.images) == count
    together = np.concatenate([data.train.labels, data.validation.labels])
    assert sorted(together) == list(range(size))
    for part in (data.train, data.validation):  # images and labels stay together, in order
        assert np.array_equal(
            np.asarray(part.images).reshape(-1, 8).view(np.int64)[:, 0], part.labels
        )
        assert (np.diff(part.labels) > 0).all()
    again = splits.with_validation(numbered(size), requested)
    assert np.array_equal(again.validation.labels, data.validation.labels)
    assert list(data.test.labels) == [size, size + 1, size + 2]


def test_a_set_without_enough_images_for_a_validation_split_is_refused():
    endless = numbered(1)
    endless = endless._replace(train=types.Split(range(types.ENDLESS), range(types.ENDLESS)))
    for data, message in ((endless, "endless"), (numbered(1), "one training image")):
        with pytest.raises(UserError, match=message):
            splits.with_validation(data, None)
        assert splits.with_validation(data, 0).validation is None


def test_validation_images_are_from_all_parts_of_the_training_set():
    indices = splits.with_validation(numbered(10_000), None).validation.labels
    assert abs(indices.mean() - 5_000) < 4 * 10_000 / np.sqrt(12 * 1000)
    assert np.histogram(indices, 10, (0, 10_000))[0].min() > 60


def test_an_existing_validation_split_is_used_and_may_be_shortened_or_omitted():
    data = numbered(100, validation=20)
    assert np.array_equal(splits.with_validation(data, None).validation.labels, range(-20, 0))
    assert len(splits.with_validation(data, 5).validation.images) == 5
    for requested in (None, 0, 5):
        assert len(splits.with_validation(data, requested).train.images) == 100
    assert splits.with_validation(data, 0).validation is None
    assert splits.with_validation(numbered(100), 0).validation is None
    assert len(splits.with_validation(numbered(100), 0).train.images) == 100


@pytest.mark.parametrize(("available", "requested"), [(None, 100), (None, 101), (20, 21)])
def test_more_validation_images_than_available_are_an_error(available, requested):
    with pytest.raises(UserError, match=rf"--config\.data\.validation={requested}: numbers has"):
        splits.with_validation(numbered(100, available), requested)


def test_rows_of_an_array_on_disk_equal_rows_in_memory(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 2, 3), np.uint8)
    np.save(tmp_path / "a.npy", array)
    kept = np.array([3, 4, 10, 40, 49])
    rows = types.Rows(np.load(tmp_path / "a.npy", mmap_mode="r"), kept)
    assert (len(rows), rows.shape, rows.dtype) == (5, (5, 2, 3), np.uint8)
    assert np.array_equal(np.asarray(rows), array[kept])
    assert np.array_equal(rows[np.array([4, 0, 0])], array[[49, 3, 3]])
    assert np.array_equal(rows[np.array([True, False, False, True, False])], array[[3, 40]])
    assert np.array_equal(np.asarray(rows[1:4][1:]), array[[10, 40]])
    assert np.array_equal(np.asarray(rows, np.float32), array[kept].astype(np.float32))


@pytest.mark.parametrize("name", ["validation", "Val", "valid", "dev", "EVAL"])
@pytest.mark.parametrize("has_test", [True, False])
def test_a_validation_split_of_a_folder_is_used(name, has_test, tmp_path):
    counts = {"train": 6, name: 3} | ({"Test": 2} if has_test else {})
    for number, (split, count) in enumerate(counts.items()):
        for i in range(count):
            write(tmp_path / split / "a" / f"{i}.png", 10 * number + i)
    data = loader.load(f"folder:{tmp_path}")
    sizes = [len(part.images) for part in (data.train, data.validation, data.test)]
    assert sizes == (
        [6, 3, 2] if has_test else [5, 1, 3]
    )  # without test, the held-out split is the test split
    assert data.classes == ("a",)
    again = loader.load(f"folder:{tmp_path}")  # from the cache
    assert np.array_equal(again.validation.images, data.validation.images)


# Folders.


def write(path, seed, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, len(mode)), np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return pixels


def test_a_folder_is_read_with_its_images_and_labels(tmp_path):
    expected = {}
    for label in ("cat", "dog"):
        for i in range(20):
            image = write(tmp_path / label / f"{i}.png", seed=len(expected))
            expected[image.tobytes()] = label
    data = loader.load(f"folder:{tmp_path}", validation=0)
    assert data.classes == ("cat", "dog")
    assert len(data.test.images) > 0
    actual = {}
    for part in (data.train, data.test):
        for image, label in zip(part.images, part.labels, strict=True):
            actual[image.tobytes()] = data.classes[label]
    assert actual == expected


def test_folders_train_and_test_are_the_splits(tmp_path):
    for name, count in (("train", 5), ("test", 3)):
        for i in range(count):
            write(tmp_path / name / "a" / f"{i}.png", i)
    data = loader.load(f"folder:{tmp_path}", validation=0)
    assert (len(data.train.images), len(data.test.images)) == (5, 3)
    assert data.classes == ("a",)


def test_corrupt_files_are_skipped_named_and_counted(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.png", i)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    truncated = (tmp_path / "3.png").read_bytes()[:-100]
    (tmp_path / "truncated.png").write_bytes(truncated)
    for _ in range(2):  # decoded, then from the cache
        data = loader.load(f"folder:{tmp_path}", validation=0)
        assert len(data.train.images) + len(data.test.images) == 10
        assert "skipped 2 corrupt of 12" in data.notes[0]
        assert "broken.png" in data.notes[0]
        assert "truncated.png" in data.notes[0]


def test_a_changed_folder_is_decoded_again(tmp_path):
    for i in range(10):
        write(tmp_path / f"{i}.png", i)
    first = loader.load(f"folder:{tmp_path}", validation=0)
    write(tmp_path / "new.png", 99)
    second = loader.load(f"folder:{tmp_path}", validation=0)
    assert len(second.train.images) + len(second.test.images) == 11
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("way", ["txt", "metadata"])
def test_a_folders_captions_are_read_beside_its_images(tmp_path, way):
    texts = {f"{i}.png": f"an image numbered {i} é" for i in range(10)}
    for i, (name, text) in enumerate(texts.items()):
        write(tmp_path / "sub" / name, i)
        if way == "txt":
            (tmp_path / "sub" / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    if way == "metadata":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
        (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    data = loader.load(f"folder:{tmp_path}", validation=0)
    actual = untokenize(np.concatenate([data.train.captions, data.test.captions]))
    last = texts["9.png"] if way == "txt" else ""
    assert sorted(actual) == sorted([*[*texts.values()][:9], last])
    assert any("1 of 10 images have no caption" in note for note in data.notes) == (way != "txt")
    assert data.caption_length == 32
    again = loader.load(f"folder:{tmp_path}", validation=0)  # from the cache
    np.testing.assert_array_equal(again.train.captions, data.train.captions)
    if way == "txt":
        (tmp_path / "sub" / "0.txt").write_text("another")
    else:
        lines[0] = lines[0].replace("image", "photo")
        (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(lines))
    assert loader.load(f"folder:{tmp_path}", validation=0).fingerprint != data.fingerprint


def test_an_error_names_an_invalid_line_of_metadata(tmp_path):
    write(tmp_path / "a.png", 0)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n[1]\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2"):
        loader.load(f"folder:{tmp_path}", validation=0)


def test_images_of_two_sizes_are_an_error_that_names_both(tmp_path):
    write(tmp_path / "a.png", 0)
    write(tmp_path / "b.png", 1, size=(8, 12))
    with pytest.raises(UserError, match=r"a\.png is 8x8, .*b\.png is 12x8"):
        loader.load(f"folder:{tmp_path}", validation=0)


def test_grey_images_become_rgb_if_others_are_rgb(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", i, mode="RGB" if i % 2 else "L")
    assert loader.load(f"folder:{tmp_path}", validation=0).shape == (8, 8, 3)


def test_a_pickled_array_in_the_cache_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path(tmp_path / "owned").touch, ())

    for i in range(4):
        write(tmp_path / "images" / f"{i}.png", i)
    loader.load(f"folder:{tmp_path}/images", validation=0)
    caches = [p.parent for p in (cache_module.cache_dir() / "decoded").glob("*/meta.json")]
    assert caches
    for cache in caches:
        np.save(cache / "train_images.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    data = loader.load(f"folder:{tmp_path}/images", validation=0)
    assert len(data.train.images) > 0
    assert not (tmp_path / "owned").exists()


# TFDS, on the original files.


@pytest.fixture(scope="session")
def prepared(original_files, tmp_path_factory):
    """Return a directory with MNIST and Fashion-MNIST, prepared from the original files."""
    from ddpm_jax.data.tfds import prepare
    from ddpm_jax.data.tfds_builders import library

    root = tmp_path_factory.mktemp("tfds")
    for name in ("mnist", "fashion_mnist"):
        builder = library().builder(name, data_dir=root)
        prepare(name, builder, root, print, manual_dir=str(original_files / name))
    return root


def raw(path, header):
    import gzip

    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_prepared_sets_contain_the_bytes_of_the_original_files(name, prepared, original_files):
    data = loader.load(name, str(prepared), 0)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        part = getattr(data, split)
        images = raw(original_files / name / f"{prefix}-images-idx3-ubyte.gz", 16)
        labels = raw(original_files / name / f"{prefix}-labels-idx1-ubyte.gz", 8)
        # TFDS shuffles the examples, so that only the set of (image, label) pairs is the same.
        pairs = sorted(zip(map(bytes, images.reshape(-1, 784)), labels, strict=True))
        actual = sorted(zip(map(bytes, part.images.reshape(-1, 784)), part.labels, strict=True))
        assert pairs == actual
    assert loader.load(name, str(prepared), 0).fingerprint == data.fingerprint  # from the cache


@pytest.mark.slow
def test_images_and_labels_equal_those_of_tfds_data_source(prepared):
    import tensorflow_datasets

    data = loader.load("mnist", str(prepared))
    source = tensorflow_datasets.data_source("mnist", split="test", data_dir=str(prepared))
    for row in range(0, 10_000, 501):
        assert np.array_equal(source[row]["image"], data.test.images[row])
        assert source[row]["label"] == data.test.labels[row]


def test_a_file_with_a_wrong_checksum_is_refused(original_files, tmp_path):
    import shutil

    from ddpm_jax.data.tfds import prepare
    from ddpm_jax.data.tfds_builders import library

    files = tmp_path / "files"
    shutil.copytree(original_files / "mnist", files)
    path = files / "t10k-labels-idx1-ubyte.gz"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    builder = library().builder("mnist", data_dir=tmp_path / "tfds")
    with pytest.raises(UserError, match="wrong checksum"):
        prepare("mnist", builder, tmp_path / "tfds", print, manual_dir=str(files))


def test_cifar10s_binary_records_become_images(original_files, tmp_path):
    """The test writes an archive in the format of CIFAR-10 from real images."""
    from ddpm_jax.data import tfds_builders

    sheet = np.asarray(Image.open(original_files / "cifar10" / "test_00.webp").convert("RGB"))
    tiles = sheet.reshape(25, 32, 40, 32, 3).swapaxes(1, 2).reshape(1000, 32, 32, 3)
    labels = np.fromfile(original_files / "cifar10" / "test_labels.u8", np.uint8)[:1000]
    records = np.concatenate([labels[:, None], tiles.transpose(0, 3, 1, 2).reshape(1000, -1)], 1)
    member = tmp_path / "test_batch.bin"
    member.write_bytes(records.astype(np.uint8).tobytes())
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(member, "cifar-10-batches-bin/test_batch.bin")
    actual = dict(tfds_builders._cifar10(tmp_path / "cifar.tar.gz", "test"))
    assert len(actual) == 1000
    for row, example in actual.items():
        assert np.array_equal(np.asarray(example["image"]), tiles[row])
        assert example["label"] == labels[row]


def test_an_unreachable_host_is_detected_within_seconds(tmp_path):
    import time

    from ddpm_jax.data.tfds_builders import reachable

    start = time.perf_counter()
    assert not reachable("http://192.0.2.1/file.gz")  # an address that never answers
    assert time.perf_counter() - start < 3.5
