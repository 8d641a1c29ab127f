"""Names that folders and data sets use for their splits."""

from collections.abc import Iterable

# The names of each split, in lower case; the first name is preferred.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "holdout", "held_out"),
}


def split_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the members of `names` that are names of a split, in any case, for each split.

    The preferred name of a split is first. A split is left out if no member is a name of it.
    """
    names = sorted(names)
    folders = {
        split: [name for word in words for name in names if name.lower() == word]
        for split, words in SPLIT_NAMES.items()
    }
    return {split: folders[split] for split in folders if folders[split]}
