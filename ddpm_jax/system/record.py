"""The type of JSON objects in the files of a run directory."""

from typing import Any, TypeAlias

# The content of config.json, eval.json or summary.json, or a part of it. Python has no precise
# type for the values that `json` reads and writes.
Record: TypeAlias = dict[str, Any]
