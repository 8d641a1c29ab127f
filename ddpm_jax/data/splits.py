"""Selection of the validation split, from the training images if there is no such split."""

import numpy as np

from ddpm_jax.data.types import ENDLESS, Data
from ddpm_jax.errors import UserError

VALIDATION_SHARE = 10  # by default, one training image in 10 becomes a validation image
MAX_VALIDATION = 5_000  # the largest number of validation images by default


def with_validation(data: Data, count: int | None) -> Data:
    """Return `data` with `count` validation images.

    If the data set has a validation split, the first `count` images of this split are used.
    Otherwise, `count` training images, selected with a fixed seed, become the validation split.

    Args:
      data: The data set.
      count: The number of validation images. If 0, there is no validation split and the training
        split is not changed. If None, all images of the validation split are used; a data set
        without this split uses a tenth of the training images, at least 1 and at most 5,000.

    Raises:
      UserError: If `count` is larger than the number of available images, or a data set without a
        validation split is endless or has only one training image.
    """
    if count == 0:
        return data._replace(validation=None)
    if data.validation is not None:
        available = len(data.validation.images)
        if count is not None and count > available:
            raise UserError(
                f"--config.data.validation={count}: {data.name} has only {available} validation "
                f"images; give a number from 0 to {available}"
            )
        return data._replace(validation=data.validation.first(count or available))
    size = len(data.train.images)
    if size == ENDLESS:
        raise UserError(
            f"data set {data.name} is endless and has no validation split; give "
            "--config.data.validation=0 to train without a validation split"
        )
    if count is None and size < 2:
        raise UserError(
            f"{data.name} has only one training image, which cannot also be the validation image; "
            "give more images, or --config.data.validation=0 for no validation split"
        )
    if count is None:
        count = min(max(size // VALIDATION_SHARE, 1), MAX_VALIDATION)
    if count >= size:
        raise UserError(
            f"--config.data.validation={count}: {data.name} has {size} training images, of which "
            f"at least one must remain; give a number below {size}, or 0 for no validation split"
        )
    order = np.random.Generator(np.random.Philox(key=[0, 2])).permutation(size)
    validation_rows, train_rows = np.sort(order[:count]), np.sort(order[count:])
    return data._replace(
        train=data.train.subset(train_rows), validation=data.train.rows(validation_rows)
    )
