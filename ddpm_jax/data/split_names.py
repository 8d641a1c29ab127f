"""Names that folders and data sets use for their splits."""

from collections.abc import Iterable

# The names of each split, in lower case; the first name is preferred.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "holdout", "held_out"),
}


def split_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """Return a dict from each split to the members of `names` that are names of this split.

    Upper and lower case are equal. The preferred name of a split is first in its list. A split
    without a name in `names` is not in the dict.
    """
    names = sorted(names)
    folders = {
        split: [name for word in words for name in names if name.lower() == word]
        for split, words in SPLIT_NAMES.items()
    }
    return {split: folders[split] for split in folders if folders[split]}
