"""The names of splits, and validation images where a data set has none."""

import numpy as np

from ddpm_jax.data.types import ENDLESS, Data
from ddpm_jax.errors import UserError

VALIDATION_SHARE = 10  # one training image in so many becomes a validation image, and at most

MAX_VALIDATION = 5_000  # so many


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
        available = len(data.validation.images)
        if count is not None and count > available:
            raise UserError(
                f"--config.data.validation={count}: {data.name} has {available} validation images"
            )
        return data._replace(validation=data.validation.first(count or available))
    size = len(data.train.images)
    if size == ENDLESS:
        raise UserError(
            f"{data.name} is endless and has no validation images of its own; give "
            "--config.data.validation=0"
        )
    if count is None and size < 2:
        raise UserError(
            f"{data.name} has one training image, and none can become a validation image; give "
            "more images, or --config.data.validation=0"
        )
    if count is None:
        count = min(max(size // VALIDATION_SHARE, 1), MAX_VALIDATION)
    if count >= size:
        raise UserError(
            f"--config.data.validation={count}: {data.name} has {size} training images, of which "
            "at least one must remain; give a smaller number, or 0 for no validation split"
        )
    order = np.random.Generator(np.random.Philox(key=[0, 2])).permutation(size)
    held_out, kept = np.sort(order[:count]), np.sort(order[count:])
    train, images = data.train, data.train.rows(held_out)
    return data._replace(train=train.subset(kept), validation=images)
