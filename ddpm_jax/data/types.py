"""Types of data sets: splits of images, labels and captions, and batches."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

Leaf: TypeAlias = Any  # a numpy or jax array, or another leaf of the tree of a batch

ENDLESS = 2**31 - 1  # number of examples of an endless split, which computes examples when read

SPLITS = ("train", "validation", "test")


@runtime_checkable
class RowArray(Protocol):
    """An array, or an object that is indexed as an array and computes its rows when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape; the first axis is the axis of rows."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the elements."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> "RowArray": ...


class Split(NamedTuple):
    """The examples of a split.

    Attributes:
      images: The images, uint8 [N, H, W, C] in 0 ... levels - 1.
      labels: The indices of the classes, int32 [N]; -1 for an example without a class.
      captions: The tokens of the captions, uint8 [N, L] (see `ddpm_jax/data/tokenizer.py`), or the
        features that a pretrained text encoder has computed. None if there are no captions.
    """

    images: RowArray
    labels: RowArray
    captions: Leaf = None

    def first(self, count: int) -> "Split":
        """Return the first `count` examples."""
        return self._map(lambda array: array[:count])

    def random_subset(self, count: int) -> "Split":
        """Return `count` random examples, or all examples if there are fewer; the seed is fixed."""
        size = len(self.images)
        if size == ENDLESS:
            return self.rows(np.arange(count))
        if size <= count:
            return self
        rng = np.random.Generator(np.random.Philox(key=[0, 1]))
        return self.rows(np.sort(rng.permutation(size)[:count]))

    def rows(self, rows: np.ndarray) -> "Split":
        """Return the examples at positions `rows`, int [N], as arrays in memory."""
        return self._map(lambda array: array[rows])

    def subset(self, rows: np.ndarray) -> "Split":
        """Return the examples at positions `rows`, read only when indexed (see `take_rows`)."""
        return self._map(lambda array: take_rows(array, rows))

    def _map(self, function: Callable[[RowArray], RowArray]) -> "Split":
        captions = None if self.captions is None else function(self.captions)
        return Split(function(self.images), function(self.labels), captions)


class Rows:
    """A subset of the rows of an array. The rows are read only when the subset is indexed.

    Args:
      array: The array.
      numbers: The positions of the rows in `array`, int64 [N].
    """

    def __init__(self, array: RowArray, numbers: np.ndarray) -> None:
        self._array, self._numbers = array, numbers
        self.shape: tuple[int, ...] = (len(numbers), *array.shape[1:])
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: slice | np.ndarray) -> RowArray:
        if isinstance(rows, slice):
            return Rows(self._array, self._numbers[rows])
        return self._array[self._numbers[rows]]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._array[self._numbers], dtype)


class Computed:
    """An array [N, *shape] whose rows are computed only when the array is indexed.

    Args:
      make: A function that computes the row of an example from the index of the example.
      rows: The indices of the N examples.
      shape: The shape of one row.
      dtype: The dtype of the elements.
    """

    def __init__(
        self,
        make: Callable[[int], np.ndarray | int],
        rows: range,
        shape: tuple[int, ...],
        dtype: DTypeLike = np.uint8,
    ) -> None:
        self._make, self.numbers = make, rows
        self.shape: tuple[int, ...] = (len(rows), *shape)
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice | np.ndarray) -> RowArray:
        if isinstance(rows, slice):
            return Computed(self._make, self.numbers[rows], self.shape[1:], self.dtype)
        return self._compute(rows)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._compute(np.arange(len(self))).astype(dtype or self.dtype)

    def _compute(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self._make(self.numbers[int(row)]) for row in rows], self.dtype)


class Data(NamedTuple):
    """A data set and its splits.

    Attributes:
      name: The name in `--config.data`, such as `digits` or `folder:PATH`.
      title: The name in tables, figures and messages.
      train: The training split.
      test: The test split, for the final metrics.
      levels: The number of values of a pixel channel, which are 0 ... levels - 1.
      classes: The names of the classes, in the order of their labels; empty if there are no labels.
      fingerprint: A hash that changes when the examples of a split change.
      notes: Notes for the user, for example about skipped files.
      validation: The validation split, for metrics during training and the choice of the best
        checkpoint. None if the data set has no validation split or --config.data.validation is 0.
    """

    name: str
    title: str
    train: Split
    test: Split
    levels: int
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    validation: Split | None = None

    def split(self, split: str) -> Split:
        """Return the split "train", "validation" or "test".

        Raises:
          ValueError: If `split` is "validation" and the data set has no validation split.
        """
        part = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if part is None:
            raise ValueError(f"data set {self.name} has no {split} split")
        return part

    @property
    def shape(self) -> tuple[int, int, int]:
        """The (height, width, channels) of an image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def caption_length(self) -> int:
        """The number of tokens of a caption, padding included; 0 if there are no captions."""
        return 0 if self.train.captions is None else self.train.captions.shape[1]

    def describe(self) -> dict[str, str | int | list[int] | list[str]]:
        """Return the description for config.json; a resumed run compares it with its data set."""
        return {
            "name": self.name,
            "title": self.title,
            "shape": list(self.shape),
            "levels": self.levels,
            "train": len(self.train.images),
            "validation": 0 if self.validation is None else len(self.validation.images),
            "test": len(self.test.images),
            "classes": list(self.classes),
            "caption_length": self.caption_length,
            "fingerprint": self.fingerprint,
        }


class Batch(NamedTuple):
    """A batch of B examples.

    Attributes:
      images: The images, uint8 [B, H, W, C].
      labels: The indices of the classes, int32 [B]; -1 for an example without a class.
      index: The indices of the examples, int32 [B]: in training the position in the batch, in
        evaluation the position in the split.
      captions: The tokens of the captions, as in `Split`; None if there are no captions.
    """

    images: Leaf
    labels: Leaf
    index: Leaf
    captions: Leaf = None


def take_rows(array: RowArray, rows: np.ndarray) -> RowArray:
    """Return the rows at positions `rows`, int [N], of an array.

    If `array` is in memory, the rows are copied; otherwise they are read when they are indexed.
    """
    return array[rows] if type(array) is np.ndarray else Rows(array, rows)


class Loaded(NamedTuple):
    """A loaded data set and its origin.

    Attributes:
      data: The data set.
      note: A warning if another data set replaces the data set of the config; otherwise "".
      data_dir: The directory of TFDS data sets. If None, TFDS's default directory was used.
    """

    data: Data
    note: str = ""
    data_dir: str | None = None


class DataInfo(NamedTuple):
    """The properties of a data set on which a task depends.

    Attributes:
      name: The name of the data set, such as `digits` or `folder:PATH`.
      shape: The (height, width, channels) of an image.
      levels: The number of values of a pixel channel, which are 0 ... levels - 1.
      classes: The number of classes; 0 if there are no labels.
      caption_length: The number of tokens of a caption; 0 if there are no captions.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int
    classes: int = 0
    caption_length: int = 0


UNBOUND = DataInfo("", (0, 0, 0), 2)  # `info` of a task before `Task.bind` sets it


def info_of(data: Data) -> DataInfo:
    """Return the properties of `data` on which a task depends."""
    return DataInfo(data.name, data.shape, data.levels, len(data.classes), data.caption_length)
