"""Marks of the fields of a config: ranges, and what may change or is set by the program."""

from typing import Annotated, NamedTuple


class AtLeast(NamedTuple):
    """A lower bound of a number, itself allowed."""

    low: float


class MoreThan(NamedTuple):
    """A lower bound of a number, itself not allowed."""

    low: float


class AtMost(NamedTuple):
    """An upper bound of a number, itself allowed."""

    high: float


LARGEST_INT = 2**31 - 1  # that a program counts with
SMALLEST_FLOAT, LARGEST_FLOAT = 1.2e-38, 3.4e38  # positive ones that float32 holds
FROM_DATA = "from data"
FROM_PARTS = "from parts"  # from what was trained before, and is built on
MAY_CHANGE = "may change on resuming"
PATH = "path"  # of a run, or a word in its place
Count = Annotated[int, AtLeast(1)]
Layers = Annotated[int, AtLeast(1), AtMost(1000)]  # that a network is built of, one after another
MoreLayers = Annotated[int, AtLeast(0), AtMost(1000)]  # the same, or none
Few = Annotated[int, AtLeast(1), AtMost(1000)]  # copies of each example of a batch
SampleSteps = Annotated[int, AtLeast(1), AtMost(1e6), MAY_CHANGE]  # of a sampler
NoiseSteps = Annotated[int, AtLeast(2), AtMost(1e6)]  # of a table of betas
EvalTimes = Annotated[int, AtLeast(1), AtMost(1e6)]  # at which an image is evaluated
RunPath = Annotated[str, PATH, MAY_CHANGE]
Positive = Annotated[float, MoreThan(0.0)]
NonNegative = Annotated[float, AtLeast(0.0)]
Share = Annotated[float, AtLeast(0.0), AtMost(0.99999)]  # as of dropout; never all
Length = Annotated[int, AtLeast(1), MAY_CHANGE]  # a number of steps, or of images to tell of
Interval = Annotated[int, AtLeast(0), MAY_CHANGE]  # 0: only at the end
Shape = Annotated[tuple[Count, Count, Count], FROM_DATA]  # (height, width, channels) of an image
Levels = Annotated[int, AtLeast(2), FROM_DATA]  # of grey in an image: 256, or 17 for `digits`
Classes = Annotated[int, AtLeast(0), FROM_DATA]  # of labels; 0: there are none

# Validation images; none: the data set's own, or else a tenth of the training images, at most
# 5,000; 0: every training image is trained on, and nothing is evaluated before the end.
ValidationImages = Annotated[int, AtLeast(0)] | None
CaptionLength = Annotated[int, AtLeast(0), FROM_DATA]  # tokens; 0: there are no captions
