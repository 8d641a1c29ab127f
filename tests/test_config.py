"""A config's fields are typed, checked, and named when they are wrong."""

import dataclasses
import importlib
from typing import Annotated, Literal

import pytest

from ddpm_jax import config as c
from ddpm_jax.errors import UserError
from helpers.launching import ROOT


@dataclasses.dataclass(frozen=True)
class Config:
    steps: c.Length = 10
    rate: c.Positive = 0.1
    flag: bool = False
    name: str = "a"
    kind: Literal["one", "two"] = "one"
    widths: tuple[c.Count, ...] = (1, 2)
    maybe: int | None = None
    share: Annotated[float, c.AtLeast(0.0), c.AtMost(1.0)] = 0.5
    shape: c.Shape = (1, 1, 1)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "1_000", 1000),
        ("steps", "1e5", 100_000),
        ("rate", "3e-4", 3e-4),
        ("flag", "true", True),
        ("flag", "0", False),
        ("name", "folder:/a=b", "folder:/a=b"),
        ("kind", "two", "two"),
        ("widths", "8,16", (8, 16)),
        ("widths", "(8, 16)", (8, 16)),
        ("maybe", "none", None),
        ("maybe", "3", 3),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(field, text, value):
    assert getattr(c.override(Config(), {field: text}), field) == value


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("step", "3", 'did you mean "steps"'),
        ("zzz", "3", "there are: flag, kind"),
        ("steps", "many", "whole number"),
        ("steps", "1.5", "whole number"),
        ("steps", "1e999", "whole number"),
        ("steps", "0", "at least 1"),
        ("rate", "0", "more than 0"),
        ("rate", "nan", "finite"),
        ("rate", "fast", "a number"),
        ("flag", "maybe", "true or false"),
        ("kind", "three", "one of one, two"),
        ("widths", "8,0", "at least 1"),
        ("share", "1.5", "at most 1"),
        ("shape", "3,3,3", "follows from the data"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_to_do(field, text, says):
    with pytest.raises(UserError, match=says) as error:
        c.override(Config(), {field: text})
    assert "\n" not in str(error.value)


def test_a_config_comes_back_from_its_record():
    import json

    config = dataclasses.replace(Config(), widths=(3,), maybe=4)
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    assert c.restore(Config, record, "runs/x") == config


def test_a_record_of_another_version_is_refused():
    record = {**dataclasses.asdict(Config()), "gone": 1}
    with pytest.raises(UserError, match="gone"):
        c.restore(Config, record, "runs/x")


def test_a_run_of_before_a_field_was_there_keeps_its_default_and_a_lost_field_is_told():
    recorded = {"steps": 7, "shape": [4, 4, 1]}
    assert c.restore(c.Training, recorded, "runs/x") == c.Training(steps=7, shape=(4, 4, 1))
    with pytest.raises(UserError, match="fields that are no more: colour"):
        c.restore(c.Training, {**recorded, "colour": 3}, "runs/x")


EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiments/[a-z]*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_field_that_an_experiment_defines_anew_keeps_its_marks(name):
    cls = importlib.import_module(f"experiments.{name}").Config
    for base in cls.__mro__[1:-1]:
        for mark in (c.MAY_CHANGE, c.FROM_DATA):
            assert c.marked(base, mark) <= c.marked(cls, mark), base


def test_vdm_has_no_field_of_the_process_that_it_does_not_use():
    vdm, ddpm = (importlib.import_module(f"experiments.{n}_digits").Config for n in ("vdm", "ddpm"))
    process = {"noise", "noise_steps", "prediction", "variance", "times", "weight", "label_dropout"}
    assert process <= c.fields(ddpm).keys()
    assert not (process | {"bound_scale", "flip"}) & c.fields(vdm).keys()
    with pytest.raises(UserError, match=r"unknown field .--config\.variance."):
        c.override(vdm(), {"variance": "learned"})
