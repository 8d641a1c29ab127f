"""The table of docs/metrics.md, by which the names of metrics are checked."""

import re

from helpers.launching import ROOT

PLACEHOLDERS = {
    "network": r"(?:(?!_ratio|_of_training)[^/])+",
    "t": r"0\.\d",
    "k": r"\d+",
    "n": r"\d+",
    "prompts": r"(?:single|relation)(?:_held_out)?",
    "scale": r"[-+.e\d]+",
}


def rows():
    """The names of the table, with their placeholders."""
    text = (ROOT / "docs/metrics.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def pattern(name):
    """The regular expression of a name of the table."""
    parts = re.split(r"<(\w+)>", name)
    literals, placeholders = map(re.escape, parts[::2]), parts[1::2]
    expressions = [PLACEHOLDERS[placeholder] for placeholder in placeholders]
    return "".join(a + b for a, b in zip(literals, [*expressions, ""], strict=True))


def undefined(names):
    """The names of metrics that the table does not define, after their split."""
    plain = [pattern(row) for row in rows() if "<metric>" not in row]
    defined = "|".join(plain)
    swept = rf"guidance_{PLACEHOLDERS['scale']}/(?:{defined})"
    expression = re.compile(rf"(?:{defined}|{swept})(?:_error)?")
    bare = [re.sub(r"^(train|validation|test)/", "", name) for name in names if name != "step"]
    return [name for name in bare if not expression.fullmatch(name)]
