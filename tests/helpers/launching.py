"""The path, the environment and the result of `launch.py` in tests."""

import os
import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def user_environment(**changes):
    """Return the environment of a user with one device and without prepared data sets."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return {**environment, "TFDS_DATA_DIR": os.environ["XDG_CACHE_HOME"] + "/tfds", **changes}


class Result(NamedTuple):
    """The exit code and the output of `launch.py`, run in this process."""

    returncode: int
    stdout: str
    stderr: str


def expect_one_line(result, pattern, code=2):
    """Check that stderr is one line that matches `pattern`, that stdout is empty, and the code."""
    assert result.returncode == code, result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith({1: "stopped: ", 2: "error: "}[code])
    assert re.search(pattern, lines[0]), lines[0]
    assert result.stdout == ""
