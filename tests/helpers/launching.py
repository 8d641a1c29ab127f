"""The command line as tests call it: where it lies, its environment, and what it leaves behind."""

import os
import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def user_environment(**changes):
    """The environment of a user: one device, and no data set prepared."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return {**environment, "TFDS_DATA_DIR": os.environ["XDG_CACHE_HOME"] + "/tfds", **changes}


class Result(NamedTuple):
    """What `launch.py` left behind when it ran in this process."""

    returncode: int
    stdout: str
    stderr: str


def expect_one_line(result, says, code=2):
    """Check for one line on stderr that matches `says`, nothing on stdout, and the exit code."""
    assert result.returncode == code, result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith({1: "stopped: ", 2: "error: "}[code])
    assert re.search(says, lines[0]), lines[0]
    assert result.stdout == ""
