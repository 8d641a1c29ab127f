"""`digits`: 1,797 real handwritten digits of 8x8 pixels and 17 grey levels.

scikit-learn contains the images (`sklearn.datasets.load_digits`: the test part of the UCI "optical
recognition of handwritten digits" set), so they need no download.  `digits:28` is the same set,
resized to 28x28 pixels and 256 grey levels; it replaces MNIST if MNIST is not available.  The set
has no official split, so a fixed random fifth of the examples is the test split.
"""

import gzip
import importlib.util
import pathlib

import numpy as np

from ddpm_jax.data.batches import permutation
from ddpm_jax.data.cache import fingerprint
from ddpm_jax.data.types import Data, Split
from ddpm_jax.errors import UserError

TEST_EXAMPLES = 360


def load(argument: str, data_dir: str | None) -> Data:
    """Return the data set `digits`, with images of `argument` x `argument` pixels.

    If `argument` is empty, images have the original size of 8x8 pixels. `data_dir` is not used.

    Raises:
      UserError: If the size is not a number from 8 to 256, or scikit-learn is not installed.
    """
    del data_dir  # the file is in the directory of scikit-learn
    images, labels = _read()
    levels, title = 17, "digits 8x8 (scikit-learn)"
    if argument:
        if not argument.isdecimal() or not 8 <= int(argument) <= 256:
            raise UserError(
                f"digits:{argument}: the size must be a number of pixels from 8 to 256; give for "
                "example digits:28"
            )
        side = int(argument)
        images, levels = _resize(images, side), 256
        title = f"digits (scikit-learn) resized to {side}x{side}"
    order = permutation(0, 0, len(images))
    test = Split(images[order[:TEST_EXAMPLES]], labels[order[:TEST_EXAMPLES]])
    train = Split(images[order[TEST_EXAMPLES:]], labels[order[TEST_EXAMPLES:]])
    return Data(
        name="digits" + (f":{argument}" if argument else ""),
        title=title,
        train=train,
        test=test,
        levels=levels,
        classes=tuple("0123456789"),
        fingerprint=fingerprint(train, test),
    )


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 [1797, 8, 8, 1] in 0 ... 16, and the labels, int32 [1797]."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data set digits requires scikit-learn; run pip install scikit-learn")
    # Read the file without importing sklearn, which takes two seconds.
    path = pathlib.Path(spec.submodule_search_locations[0]) / "datasets/data/digits.csv.gz"
    if path.exists():
        with gzip.open(path) as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        pixels, labels = table[:, :-1], table[:, -1]
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.int32)


def _resize(images: np.ndarray, side: int) -> np.ndarray:
    """Resize images from [N, 8, 8, 1], 17 levels, to [N, side, side, 1], 256 levels (bicubic)."""
    from PIL import Image

    grey = np.round(images[..., 0] * (255 / 16)).astype(np.uint8)
    bicubic = Image.Resampling.BICUBIC
    resized = [Image.fromarray(image).resize((side, side), bicubic) for image in grey]
    return np.stack([np.asarray(image) for image in resized])[..., None]
