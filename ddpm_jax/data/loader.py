"""Loading of data sets by name.

The name of a data set is `SOURCE[:ARGUMENT]` or the name of a TFDS data set.  The function
`load(argument, data_dir)` of the module `ddpm_jax/data/SOURCE.py` loads the data set
`SOURCE:ARGUMENT`.  To add a source, add a module.  The data package does not import jax.
"""

import importlib
import os
import pathlib
import re

from ddpm_jax.data.splits import with_validation
from ddpm_jax.data.types import Data
from ddpm_jax.errors import UserError, printable
from ddpm_jax.fields import Json

COMMON = ("mnist", "fashion_mnist", "cifar10")  # TFDS names that are often misspelled
# Modules of this package that are not data sets.
NOT_SOURCES = {
    "__init__", "batches", "cache", "captions", "folder_splits", "images", "loader", "prefetch",
    "shape_negatives", "split_names", "splits", "tfds", "tfds_builders", "tokenizer",
    "types",
}  # fmt: skip


def load(
    name: str,
    data_dir: str | None = None,
    validation: int | None = None,
    may_prepare: bool = True,
) -> Data:
    """Load data set `name` and select its validation split.

    Args:
      name: The name, such as `digits`, `digits:28`, `folder:PATH`, or a TFDS name such as `mnist`.
      data_dir: The directory of prepared TFDS data sets. If None, TFDS's default directory is used.
      validation: The number of validation images. If 0, there is no validation split; if None,
        `with_validation` selects the default number.
      may_prepare: If True, a TFDS data set that is not in `data_dir` is downloaded and prepared. If
        False, UserError is raised.

    Raises:
      MissingData: If a TFDS data set is not prepared and cannot be downloaded.
      UserError: If the name is unknown, or the data set is not valid.
    """
    check_name(name)
    source, _, argument = name.partition(":")
    if not is_of_tfds(name):
        module = importlib.import_module(f"ddpm_jax.data.{source}")
        data = module.load(argument, data_dir)
    else:
        from ddpm_jax.data import tfds

        data = tfds.load(name, data_dir, may_prepare)
    for split, part in (("training", data.train), ("test", data.test)):
        if not len(part.images):
            raise UserError(
                f"data set {name} has no {split} images; add images, or give another data set"
            )
    return with_validation(data, validation)


def check_name(name: str) -> None:
    """Check that the name of a data set is not a path or a known name in another spelling.

    Raises:
      UserError: If it is a path or another spelling; the message contains the correct name.
    """
    source, colon, argument = name.partition(":")
    sources = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")} - NOT_SOURCES
    if source in sources:
        return
    path = pathlib.Path(os.path.expanduser(name)) if name.startswith("~") else pathlib.Path(name)
    if name.startswith((".", "/", "~")) or (os.sep in name and path.is_dir()):
        raise UserError(
            f"--config.data={printable(name)} is a path, not the name of a data set; give a folder "
            f"of images as --config.data=folder:{printable(name)}"
        )
    letters = re.sub(r"[\W_]", "", source.lower())
    for correct in sorted({*sources, *COMMON}):
        if source != correct and letters == correct.replace("_", ""):
            raise UserError(
                f"--config.data={printable(name)} is not a data set; give the correct "
                f"spelling: --config.data={correct}{colon}{printable(argument)}"
            )


def is_of_tfds(name: str) -> bool:
    """Return True if TFDS reads data set `name`, False if a module of this package reads it."""
    modules = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
    return name.partition(":")[0] not in modules - NOT_SOURCES


def check_recorded_dir(name: str, data_dir: Json) -> None:
    """Check that data set `name` may be read from `data_dir`, recorded in a run's config.json.

    Raises:
      UserError: If the data set is not part of TFDS, or `data_dir` does not contain it.
    """
    from ddpm_jax.data import tfds_builders

    if not tfds_builders.is_known(name):
        raise UserError(
            f'the data set "{name}" of this run is not part of TFDS; give --data_dir=DIR, the '
            "directory that contains it"
        )
    folder = data_dir if isinstance(data_dir, str) else ""
    if not os.path.isdir(os.path.join(folder, tfds_builders.base_name(name))):
        raise UserError(
            f'the directory "{data_dir}", from which this run read its data, does not contain '
            f"{name}; give --data_dir=DIR, the directory that contains it"
        )
