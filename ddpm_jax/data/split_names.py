"""What folders and data sets call their splits."""

from collections.abc import Iterable

# What folders and data sets call their splits, in any case; the first name is preferred.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "holdout", "held_out"),
}


def split_folders(names: Iterable[str]) -> dict[str, list[str]]:
    """Return which of `names` mean each split, the preferred one first; only splits with any."""
    names = sorted(names)
    folders = {
        split: [name for word in words for name in names if name.lower() == word]
        for split, words in SPLIT_NAMES.items()
    }
    return {split: folders[split] for split in folders if folders[split]}
