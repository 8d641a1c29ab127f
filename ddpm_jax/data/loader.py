"""The one loader: a data set by name, decoded once, and the batch of any step.

A data set is named `SOURCE[:ARGUMENT]`: the file `ddpm_jax/data/SOURCE.py` reads it (its
function `load(argument, data_dir)`), and any other name is one of TFDS's.  A new source is
a new file.  Nothing here imports jax.
"""

import importlib
import os
import pathlib
import re

from ddpm_jax.data.splits import with_validation
from ddpm_jax.data.types import Data
from ddpm_jax.errors import UserError, printable
from ddpm_jax.fields import Json

COMMON = ("mnist", "fashion_mnist", "cifar10")  # names of TFDS that are spelled in many ways
# Files of this folder that are not data sets.
NO_SOURCES = {
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
            raise UserError(f"data set {name} has no {split} images")
    return with_validation(data, validation)


def check_name(name: str) -> None:
    """Check that the name of a data set is not a path, or a known name in another spelling.

    Raises:
      UserError: it is; the message gives the name to use.
    """
    source, colon, argument = name.partition(":")
    files = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")} - NO_SOURCES
    if source in files:
        return
    path = pathlib.Path(os.path.expanduser(name)) if name.startswith("~") else pathlib.Path(name)
    if name.startswith((".", "/", "~")) or (os.sep in name and path.is_dir()):
        raise UserError(
            f"--config.data={printable(name)}: is a path; a folder of images is given as "
            f"--config.data=folder:{printable(name)}"
        )
    plain = re.sub(r"[\W_]", "", source.lower())
    for known in sorted({*files, *COMMON}):
        if source != known and plain == known.replace("_", ""):
            raise UserError(
                f"--config.data={printable(name)}: is spelled {known}; give "
                f"--config.data={known}{colon}{printable(argument)}"
            )


def is_of_tfds(name: str) -> bool:
    """Return whether a data set is none that a file here reads."""
    files = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
    return name.partition(":")[0] not in files - NO_SOURCES


def check_recorded_dir(name: str, data_dir: Json) -> None:
    """Check that the folder of TFDS data that a run's record names may be read, and is there.

    Raises:
      UserError: TFDS itself has no such data set, or it does not lie there.
    """
    from ddpm_jax.data import tfds_builders

    if not tfds_builders.is_known(name):
        raise UserError(
            f'the data set "{name}" of this run is not one that TFDS itself has; give '
            "--data_dir=DIR, the folder in which it lies"
        )
    folder = data_dir if isinstance(data_dir, str) else ""
    if not os.path.isdir(os.path.join(folder, tfds_builders.base_name(name))):
        raise UserError(
            f'"{data_dir}", where the data of this run were, holds no {name}; give --data_dir=DIR'
        )
