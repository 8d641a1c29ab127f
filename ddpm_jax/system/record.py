"""The type of the records in the JSON files of a run."""

from typing import Any, TypeAlias

# A JSON object: config.json, eval.json, summary.json, or a part of one of them. Python has no
# precise type for the values that `json` reads and writes.
Record: TypeAlias = dict[str, Any]
