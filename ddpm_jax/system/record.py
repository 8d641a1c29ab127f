"""What the JSON files of a run hold."""

from typing import Any, TypeAlias

# An object of JSON: config.json, eval.json, summary.json, or a part of one of them. Its values are
# what `json` reads and writes, which no type of Python states.
Record: TypeAlias = dict[str, Any]
