"""What a data set is: images, labels and captions of its splits, and a batch of them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

Leaf: TypeAlias = Any  # a numpy or jax array, or what stands in its place in a tree of batches

ENDLESS = 2**31 - 1  # examples of a set that is drawn as it is asked for

SPLITS = ("train", "validation", "test")


@runtime_checkable
class RowArray(Protocol):
    """An array, or what is indexed as one and computes its rows when it is asked for them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole; its first axis is over rows."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of an element."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> "RowArray": ...


class Split(NamedTuple):
    """Images [N, H, W, C], uint8 in 0 ... levels - 1, and labels [N], int32 (-1: none).

    captions: as tokens [N, L] (`ddpm_jax/data/tokenizer.py`), if there are any, or as a text
      encoder takes them.
    """

    images: RowArray
    labels: RowArray
    captions: Leaf = None

    def first(self, count: int) -> "Split":
        """Return the first examples alone."""
        return self._map(lambda array: array[:count])

    def some(self, count: int) -> "Split":
        """Return a fixed sample of `count` examples, or all."""
        size = len(self.images)
        if size == ENDLESS:
            return self.rows(np.arange(count))
        if size <= count:
            return self
        draws = np.random.Generator(np.random.Philox(key=[0, 1]))
        return self.rows(np.sort(draws.permutation(size)[:count]))

    def rows(self, rows: np.ndarray) -> "Split":
        """Return the examples at `rows`, made."""
        return self._map(lambda array: array[rows])

    def subset(self, rows: np.ndarray) -> "Split":
        """Return the examples at `rows`, which are read when they are asked for."""
        return self._map(lambda array: take_rows(array, rows))

    def _map(self, of: Callable[[RowArray], RowArray]) -> "Split":
        captions = None if self.captions is None else of(self.captions)
        return Split(of(self.images), of(self.labels), captions)


class Rows:
    """Some rows of an array, which are read when they are indexed: by a slice or by numbers.

    Args:
      array: an array, or what is indexed as one.
      numbers: the rows, int64 [N].
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
    """Rows [N, *shape] of `make(index)`, computed when they are indexed by a slice or by numbers.

    Args:
      make: computes the row of an example.
      rows: the numbers of the examples.
      shape: of a row.
      dtype: of an element.
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
    notes: tuple[str, ...] = ()  # for the user, such as skipped files
    validation: Split | None = None  # None: the source has none, or it was given up (validation 0)

    def part(self, split: str) -> Split:
        """Return the split "train", "validation" or "test".

        Raises:
          ValueError: there is no validation split.
        """
        part = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if part is None:
            raise ValueError(f"{self.name} has no {split} split")
        return part

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def caption_length(self) -> int:
        """Tokens of a caption, padding included; 0: there are no captions."""
        return 0 if self.train.captions is None else self.train.captions.shape[1]

    def describe(self) -> dict[str, str | int | list[int] | list[str]]:
        """Return what `config.json` records: enough to know the same data again."""
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
    """A batch of a step: images uint8, labels, each example's index in that batch, captions."""

    images: Leaf
    labels: Leaf
    index: Leaf
    captions: Leaf = None


def take_rows(array: RowArray, rows: np.ndarray) -> RowArray:
    """Return some rows of an array: at once if it is in memory, else when they are asked for."""
    return array[rows] if type(array) is np.ndarray else Rows(array, rows)


class Loaded(NamedTuple):
    """A data set, and a warning where it is not the one that was asked for."""

    data: Data
    note: str = ""
    data_dir: str | None = None  # where it was read


class DataInfo(NamedTuple):
    """What a task must know of a data set.

    Attributes:
      name: The data set's name, such as `digits` or `folder:PATH`.
      shape: (height, width, channels) of an image.
      levels: Grey levels of a pixel.
      classes: Number of classes; 0: there are no labels.
      caption_length: Tokens of a caption; 0: there are no captions.
    """

    name: str
    shape: tuple[int, int, int]
    levels: int
    classes: int = 0
    caption_length: int = 0


UNBOUND = DataInfo("", (0, 0, 0), 2)  # of a task that no data set is known for yet


def info_of(data: Data) -> DataInfo:
    """Return what a task must know of `data`."""
    return DataInfo(data.name, data.shape, data.levels, len(data.classes), data.caption_length)
