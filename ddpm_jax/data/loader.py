"""The one loader: a data set by name, decoded once, and the batch of any step.

A data set is named `SOURCE[:ARGUMENT]`: the file `ddpm_jax/data/SOURCE.py` reads it (its
function `load(argument, data_dir)`), and any other name is one of TFDS's.  A new source is
a new file.  Nothing here imports jax.
"""

import hashlib
import importlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.tokenizer import fitting, tokenize
from ddpm_jax.errors import UserError

ENDLESS = 2**31 - 1  # examples of a set that is drawn as it is asked for
VALIDATION_SHARE = 10  # one training image in so many becomes a validation image, and at most
MAX_VALIDATION = 5_000  # so many

SPLITS = ("train", "validation", "test")
# What folders and data sets call their splits, in any case; the first name is preferred.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "holdout", "held_out"),
}
# Files of this folder that are no data sets.
NO_SOURCES = {"__init__", "captions", "images", "loader", "prefetch", "tfds"}


class Split(NamedTuple):
    """Images [N, H, W, C], uint8 in 0 ... levels - 1, and labels [N], int32 (-1: none).

    captions: as tokens [N, L] (`ddpm_jax/data/tokenizer.py`), if there are any.
    Arrays, or what is indexed as they are and makes its rows when it is asked for them.
    """

    images: np.ndarray
    labels: np.ndarray
    captions: Any = None

    def first(self, count: int) -> "Split":
        """The first examples alone."""
        return self._each(lambda array: array[:count])

    def some(self, count: int) -> "Split":
        """So many, or all, always the same ones, as a sample of the whole."""
        size = len(self.images)
        if size == ENDLESS:
            return self.rows(np.arange(count))
        if size <= count:
            return self
        draws = np.random.Generator(np.random.Philox(key=[0, 1]))
        return self.rows(np.sort(draws.permutation(size)[:count]))

    def rows(self, rows: np.ndarray) -> "Split":
        """The examples at `rows`, made."""
        return self._each(lambda array: array[rows])

    def subset(self, rows: np.ndarray) -> "Split":
        """The examples at `rows`, which are read when they are asked for."""
        return self._each(lambda array: _left(array, rows))

    def _each(self, of: Callable[[Any], Any]) -> "Split":
        captions = None if self.captions is None else of(self.captions)
        return Split(of(self.images), of(self.labels), captions)


class Rows:
    """Some rows of an array, which are read when they are indexed: by a slice or by numbers.

    Args:
      array: an array, or what is indexed as one.
      numbers: the rows, int64 [N].
    """

    def __init__(self, array: Any, numbers: np.ndarray) -> None:
        self._array, self._numbers = array, numbers
        self.shape, self.dtype = (len(numbers), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return Rows(self._array, self._numbers[rows])
        return self._array[self._numbers[rows]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._array[self._numbers], dtype)


class Data(NamedTuple):
    """A data set with its splits; `title` is what tables and figures call it.

    train: what gradients are computed on.
    validation: what every choice is made on: curves during training, the best checkpoint.
    test: what the final figures are computed on.
    """

    name: str
    title: str
    train: Split
    test: Split
    levels: int
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()  # what the user should be told, such as skipped files
    validation: Split | None = None  # None: the source has none, or it was given up (validation 0)

    def part(self, split: str) -> Split:
        """The split "train", "validation" or "test".

        Raises:
          ValueError: there is no validation split.
        """
        found = getattr(self, split)
        if found is None:
            raise ValueError(f"{self.name} has no {split} split")
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def caption_length(self) -> int:
        """Tokens of a caption, padding included; 0: there are no captions."""
        return 0 if self.train.captions is None else self.train.captions.shape[1]

    def describe(self) -> dict[str, Any]:
        """What `config.json` records: enough to know the same data again."""
        return {
            "name": self.name,
            "title": self.title,
            "shape": list(self.shape),
            "levels": self.levels,
            "train": len(self.train.images),
            "validation": 0 if self.validation is None else len(self.validation.images),
            "test": len(self.test.images),
            "classes": list(self.classes),
            "fingerprint": self.fingerprint,
        }


class Batch(NamedTuple):
    """A batch of a step: images uint8, labels, each example's index in that batch, captions."""

    images: Any
    labels: Any
    index: Any
    captions: Any = None


class MissingData(UserError):
    """The data set is not at hand and cannot be had; a fallback may take its place."""


def load(
    name: str,
    data_dir: str | None = None,
    validation: int | None = None,
    may_prepare: bool = True,
) -> Data:
    """Load data set `name`, with a validation split.

    Args:
      name: `digits`, `digits:28`, `folder:PATH`, or a TFDS name such as `mnist`.
      data_dir: where TFDS data sets lie or are prepared; TFDS's own default if None.
      validation: as `with_validation` takes it.
      may_prepare: whether a data set that is not in `data_dir` may be prepared there.

    Raises:
      MissingData: it is neither prepared nor can be downloaded.
      UserError: the name or what it names is wrong.
    """
    source, _, argument = name.partition(":")
    if not is_of_tfds(name):
        module = importlib.import_module(f"ddpm_jax.data.{source}")
        data = module.load(argument, data_dir)
    else:
        from ddpm_jax.data import tfds

        data = tfds.load(name, data_dir, may_prepare)
    for split, part in (("training", data.train), ("test", data.test)):
        if not len(part.images):
            raise UserError(f"data set {name} has no {split} images")
    return with_validation(data, validation)


def with_validation(data: Data, count: int | None) -> Data:
    """Return `data` with `count` validation images.

    They are the source's own, or else training images that are chosen by a fixed seed and left out
    of the training split.

    Args:
      count: how many; 0: no validation split, every training image is trained on; None: all of the
        source's own, or else a tenth of the training images, at least one and at most 5,000.

    Raises:
      UserError: there are not so many images.
    """
    if count == 0:
        return data._replace(validation=None)
    if data.validation is not None:
        own = len(data.validation.images)
        if count is not None and count > own:
            raise UserError(f"--config.validation={count}: {data.name} has {own} validation images")
        return data._replace(validation=data.validation.first(count or own))
    size = len(data.train.images)
    if size == ENDLESS:
        raise UserError(
            f"{data.name} is endless and has no validation images of its own; give "
            "--config.validation=0"
        )
    if count is None and size < 2:
        raise UserError(
            f"{data.name} has one training image, and none can become a validation image; give "
            "more images, or --config.validation=0"
        )
    if count is None:
        count = min(max(size // VALIDATION_SHARE, 1), MAX_VALIDATION)
    if count >= size:
        raise UserError(
            f"--config.validation={count}: {data.name} has {size} training images, of which at "
            "least one must remain; give a smaller number, or 0 for no validation split"
        )
    order = np.random.Generator(np.random.Philox(key=[0, 2])).permutation(size)
    held_out, kept = np.sort(order[:count]), np.sort(order[count:])
    train, images = data.train, data.train.rows(held_out)
    return data._replace(train=train.subset(kept), validation=images)


def _left(array: Any, rows: np.ndarray) -> Any:
    """Some rows of an array: at once if it is in memory, or else when they are asked for."""
    return array[rows] if type(array) is np.ndarray else Rows(array, rows)


def is_of_tfds(name: str) -> bool:
    """Whether a data set is none that a file here reads."""
    files = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
    return name.partition(":")[0] not in files - NO_SOURCES


def check_recorded_dir(name: str, data_dir: Any) -> None:
    """Check that the folder of TFDS data that a run's record names may be read, and is there.

    Raises:
      UserError: TFDS itself has no such data set, or it does not lie there.
    """
    from ddpm_jax.data import tfds

    if not tfds.is_known(name):
        raise UserError(
            f'the data set "{name}" of this run is not one that TFDS itself has; give '
            "--data_dir=DIR, the folder in which it lies"
        )
    folder = data_dir if isinstance(data_dir, str) else ""
    if not os.path.isdir(os.path.join(folder, tfds.base_name(name))):
        raise UserError(
            f'"{data_dir}", where the data of this run were, holds no {name}; give --data_dir=DIR'
        )


def split_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """Which of `names` mean each split, the preferred one first; only splits that have any."""
    names = sorted(names)
    found = {
        split: [name for word in words for name in names if name.lower() == word]
        for split, words in SPLIT_NAMES.items()
    }
    return {split: some for split, some in found.items() if some}


def usable_captions(texts: dict[str, list[str]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Captions of each split as tokens, all of one length, and notes about them.

    Args:
      texts: by split.

    Returns:
      Tokens by split, or None for each where no training image has a caption.
    """
    if not any(text.strip() for text in texts["train"]):
        note = "all captions of the training images are empty: it counts as a set without captions"
        return dict.fromkeys(texts), (note,)
    needed = max(fitting(some) for some in texts.values())
    same = len(set(texts["train"])) == 1 < len(texts["train"])
    notes = ("all training images have the same caption",) if same else ()
    return {split: tokenize(some, needed) for split, some in texts.items()}, notes


ALL = slice(None)

# Order: a function of (seed, step) alone, so that resuming needs no iterator state.


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch`: int64 [size]."""
    bits = np.random.Philox(key=[seed % 2**64, epoch])
    return np.random.Generator(bits).permutation(size)


def epoch_order(seed: int, size: int) -> Callable[[int, int], np.ndarray]:
    """Returns rows(start, stop): which examples stand at places start ... stop - 1.

    Epoch after epoch is laid end to end, each a permutation of its own, so every epoch
    shows every example once and a batch may straddle two epochs.

    Of an endless set the examples stand in their own order, from a first one that the seed draws
    among all 2^31 - 1: no example is shown twice, and two runs of 200,000 examples whose seeds
    differ share any with a probability of 2e-4.
    """
    if size == ENDLESS:
        draws = np.random.Generator(np.random.Philox(key=[seed % 2**64, ENDLESS]))
        first = int(draws.integers(ENDLESS))
        return lambda start, stop: (first + np.arange(start, stop)) % ENDLESS
    orders: dict[int, np.ndarray] = {}

    def rows(start: int, stop: int) -> np.ndarray:
        parts = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            if epoch not in orders:
                while len(orders) > 1:  # two epochs at most are ever in use
                    orders.pop(min(orders))
                orders[epoch] = permutation(seed, epoch, size)
            low, high = start - epoch * size, stop - epoch * size
            parts.append(orders[epoch][max(low, 0) : min(high, size)])
        return np.concatenate(parts)

    return rows


def training_batches(
    split: Split,
    seed: int,
    batch_size: int,
    plan: Iterable[tuple[int, int]],
    stack: int | None,
    mine: slice = ALL,
) -> Iterator[Batch]:
    """The batches of steps [first, last) for every (first, last) of `plan`.

    Of each batch the rows `mine` are read, and no others.

    With `stack`, that many batches lie along a leading axis, [stack, batch_size, ...], those
    from `last` on being only there to fill it; without, every call is one step.
    """
    rows = epoch_order(seed, len(split.images))
    index = np.arange(batch_size, dtype=np.int32)[mine]
    for first, _ in plan:
        steps = stack or 1
        order = rows(first * batch_size, (first + steps) * batch_size)
        order = order.reshape(steps, batch_size)[:, mine].reshape(-1)
        batch = batch_of(split, order, np.tile(index, steps))
        if stack:
            batch = _stacked(batch, stack)
        yield batch


def _stacked(some: Any, stack: int) -> Any:
    """Every array of a batch, within whatever tuples, with `stack` batches along a new axis."""
    if isinstance(some, tuple):
        return type(some)(*(_stacked(array, stack) for array in some))
    return some if some is None else some.reshape(stack, -1, *some.shape[1:])


def evaluation_batches(
    split: Split, batch_size: int, mine: slice = ALL
) -> Iterator[tuple[Batch, int]]:
    """Every example once, in order: (batch, how many of the whole of it count).

    The last batch is filled up with its first example, so that one shape serves all; the
    index is the example's place in the split.  Of each batch the rows `mine` are read.
    """
    size = len(split.images)
    for start in range(0, size, batch_size):
        count = min(batch_size, size - start)
        order = np.full(batch_size, start)
        order[:count] = np.arange(start, start + count)
        order = order[mine]
        yield batch_of(split, order, order.astype(np.int32)), count


def batch_of(split: Split, rows: np.ndarray, index: np.ndarray) -> Batch:
    """The examples at `rows` of a split."""
    some = split.rows(rows)
    return Batch(some.images, some.labels, index, some.captions)


# Decoded once: a folder with images.npy and labels.npy per split, and meta.json.


def cache_dir() -> pathlib.Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/ddpm_jax or ~/.cache/ddpm_jax."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(root) / "ddpm_jax"


def decoded_once(source: pathlib.Path, stamp: str, decode: Callable[[], Data]) -> Data:
    """`decode()`, kept in the user's cache as memory-mapped arrays for the next time.

    Args:
      source: the folder that the data come from; nothing is written there.
      stamp: changes when what was decoded changes.
    """
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    place = cache_dir() / "decoded" / name
    kept = _read_decoded(place, stamp)
    if kept is not None:
        return kept
    notes: list[str] = []
    if (place / "meta.json").exists():
        notes.append(f"decoded again: {place} is damaged, or of other files")
    data = decode()
    try:
        _write_decoded(place, stamp, data)
    except OSError as error:
        notes.append(f"cannot write {place} ({error.strerror}): decoded again at the next start")
        kept = data
    else:
        kept = _read_decoded(place, stamp) or data
    return kept._replace(notes=(*kept.notes, *notes))


def fingerprint(*splits: Split | None) -> str:
    """A hash of every image and label; None is a split that there is not."""
    digest = hashlib.sha256()
    for split in (split for split in splits if split is not None):
        for array in (array for array in split if array is not None):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _read_decoded(place: pathlib.Path, stamp: str) -> Data | None:
    try:
        meta = json.loads((place / "meta.json").read_text())
        if meta.pop("stamp") != stamp:
            return None
        forms = meta.pop("forms")
        splits = {split: _read_split(place, split) for split in SPLITS if split in forms}
        if {split: _forms(part) for split, part in splits.items()} != forms:
            return None
        meta |= {"classes": tuple(meta["classes"]), "notes": tuple(meta["notes"])}
        parts: dict[str, Any] = {"validation": None, **splits}
        data = Data(**parts, **meta)
        _check_decoded(data)
    except Exception:
        return None  # absent, torn, of another time or whatever else: decoded anew
    return data


def _read_split(place: pathlib.Path, split: str) -> Split:
    captions = place / f"{split}_captions.npy"
    return Split(
        np.load(place / f"{split}_images.npy", mmap_mode="r", allow_pickle=False),
        np.load(place / f"{split}_labels.npy", allow_pickle=False),
        np.load(captions, allow_pickle=False) if captions.exists() else None,
    )


def _check_decoded(data: Data) -> None:
    """Raises ValueError unless the arrays of all splits belong together."""
    captions = data.train.captions
    for part in (data.train, data.validation, data.test):
        if part is None:
            continue
        count = len(part.images)
        known: list[tuple[Any, Any, tuple]] = [
            (part.images, np.uint8, (count, *data.shape)),
            (part.labels, np.int32, (count,)),
        ]
        if captions is not None:
            known.append((part.captions, np.uint8, (count, captions.shape[1])))
        if (captions is None) != (part.captions is None) or any(
            array.dtype != kind or array.shape != shape for array, kind, shape in known
        ):
            raise ValueError("arrays that do not belong together")
        if count and not -1 <= part.labels.min() <= part.labels.max() < max(len(data.classes), 1):
            raise ValueError("labels that are no classes")
    texts = (data.name, data.title, data.fingerprint, *data.classes, *data.notes)
    if not all(isinstance(text, str) for text in texts) or data.levels != 256:
        raise ValueError("a description that is not text")


def _forms(split: Split | None) -> list[list[Any]]:
    """The shape and the type of each array, as JSON has them."""
    return [[list(a.shape), str(a.dtype)] for a in split or () if a is not None]


def _write_decoded(place: pathlib.Path, stamp: str, data: Data) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=place.name + ".", dir=place.parent))
    try:
        for split in SPLITS:
            part = getattr(data, split)
            if part is None:
                continue
            np.save(draft / f"{split}_images.npy", part.images)
            np.save(draft / f"{split}_labels.npy", part.labels)
            if part.captions is not None:
                np.save(draft / f"{split}_captions.npy", part.captions)
        meta = {key: getattr(data, key) for key in Data._fields if key not in SPLITS}
        parts = {split: getattr(data, split) for split in SPLITS}
        meta["forms"] = {name: _forms(part) for name, part in parts.items() if part is not None}
        (draft / "meta.json").write_text(json.dumps({"stamp": stamp, **meta}))
        draft.chmod(0o755)
        if place.exists():
            shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)  # whole or not at all, whoever else writes it meanwhile
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
