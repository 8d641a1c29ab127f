"""A config's fields are typed, checked, and named when they are wrong."""

import dataclasses
import importlib
from typing import Annotated, Literal

import pytest

from ddpm_jax import config as c
from ddpm_jax import fields
from ddpm_jax.errors import UserError
from helpers.launching import ROOT


@dataclasses.dataclass(frozen=True)
class Config:
    steps: fields.Length = 10
    rate: fields.Positive = 0.1
    flag: bool = False
    name: str = "a"
    kind: Literal["one", "two"] = "one"
    widths: tuple[fields.Count, ...] = (1, 2)
    maybe: int | None = None
    share: Annotated[float, fields.AtLeast(0.0), fields.AtMost(1.0)] = 0.5
    shape: fields.Shape = (1, 1, 1)


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
    record = json.loads(json.dumps(c.to_record(config)))
    assert c.restore(Config, record, "runs/x") == config


def test_a_record_of_another_version_is_refused():
    record = {**c.to_record(Config()), "gone": 1}
    with pytest.raises(UserError, match="gone"):
        c.restore(Config, record, "runs/x")


def test_a_run_of_before_a_field_was_there_keeps_its_default_and_a_lost_field_is_told():
    recorded = {"steps": 7, "shape": [4, 4, 1]}
    assert c.restore(c.Training, recorded, "runs/x") == c.Training(steps=7, shape=(4, 4, 1))
    with pytest.raises(UserError, match="unknown config fields: colour"):
        c.restore(c.Training, {**recorded, "colour": 3}, "runs/x")


EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiments/[a-z]*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_field_that_an_experiment_defines_anew_keeps_its_marks(name):
    cls = importlib.import_module(f"experiments.{name}").Config
    for base in cls.__mro__[1:-1]:
        for mark in (fields.MAY_CHANGE, fields.FROM_DATA):
            assert c.marked(base, mark) <= c.marked(cls, mark), base


def test_vdm_has_no_field_of_the_process_that_it_does_not_use():
    vdm, ddpm = (importlib.import_module(f"experiments.{n}_digits").Config for n in ("vdm", "ddpm"))
    process = {"noise", "noise_steps", "prediction", "variance", "times", "weight", "label_dropout"}
    assert process <= c.hints_of(ddpm).keys()
    assert not (process | {"bound_scale", "flip"}) & c.hints_of(vdm).keys()
    with pytest.raises(UserError, match=r"unknown field .--config\.variance."):
        c.override(vdm(), {"variance": "learned"})


@dataclasses.dataclass(frozen=True)
class Small:
    """A small network.

    Attributes:
      width: of every layer, in units.
      names: of its inputs,
        in order.
    """

    width: fields.Count = 4
    names: Annotated[tuple[str, ...], fields.OR_NONE] = ("a",)
    size: Annotated[int, fields.BOUND] = 0


@dataclasses.dataclass(frozen=True)
class Deep:
    """A deep network."""

    depth: fields.Layers = 2
    inner: Small = Small(width=7)


@dataclasses.dataclass(frozen=True)
class Named:
    """A data set."""

    name: str = "digits"
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Whole:
    """A config of sections."""

    data: Named = Named()
    network: Small | Deep = Small()
    sampling: Annotated[Small, fields.MAY_CHANGE] = Small(width=9)
    extra: Deep | None = None


def test_a_dotted_path_sets_a_field_and_a_section_is_chosen_by_name_in_any_order():
    texts = {"network.inner.width": "3", "network.depth": "5", "network": "deep"}
    for order in (texts, dict(reversed(texts.items()))):
        assert c.override(Whole(), order).network == Deep(5, Small(width=3))
    assert c.override(Whole(), {"data": "mnist"}).data == Named("mnist")
    assert c.override(Whole(), {"data": "mnist", "data.part": "2"}).data == Named("mnist", 2)
    assert c.override(Whole(), {"extra": "deep", "extra.depth": "1"}).extra == Deep(1)
    assert c.override(Whole(extra=Deep()), {"extra": "none"}).extra is None


def test_a_tuned_alternative_comes_before_debug_and_debug_before_the_command_line():
    tuned, debug = {"network": (Deep(depth=8),)}, {"network.inner.width": 2, "network.width": 1}
    assert c.override(Whole(), {"network": "deep"}, None, tuned).network == Deep(8)
    assert c.override(Whole(), {"network": "deep"}, debug, tuned).network == Deep(8, Small(2))
    assert c.override(Whole(), {}, debug, tuned).network == Small(1)
    texts = {"network": "deep", "network.inner.width": "6"}
    assert c.override(Whole(), texts, debug, tuned).network == Deep(8, Small(6))
    assert c.override(Whole(network=Deep(3)), {"network": "deep"}, None, tuned).network == Deep(3)


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("width", "3", "did you mean --config.network.width or --config.sampling.width"),
        ("network.widht", "3", "did you mean --config.network.width"),
        ("network.depth", "3", "a field of deep, and --config.network is small; give"),
        ("network", "q", 'there is no "q"; there are: deep, small'),
        ("sampling", "small", "has several fields; set one of them, such as --config.sampling.wid"),
        ("network.size", "3", "cannot be set"),
        ("zzz", "3", "--help lists the fields"),
        ("data.name.x", "3", "unknown field"),
    ],
)
def test_a_wrong_path_names_the_right_one(path, text, says):
    with pytest.raises(UserError, match=says) as error:
        c.override(Whole(), {path: text})
    assert "\n" not in str(error.value)


def test_an_empty_tuple_means_none_where_that_is_allowed():
    for text in ("none", "()", ""):
        assert c.override(Whole(), {"network.names": text}).network == Small(names=())
    with pytest.raises(UserError, match="one value or more"):
        c.override(Config(), {"widths": "()"})


def test_sections_come_back_from_their_record_and_bound_fields_are_not_in_it():
    import json

    config = Whole(network=Deep(3, Small(5, (), size=8)), extra=Deep())
    record = json.loads(json.dumps(c.to_record(config)))
    assert record["network"]["type"] == "deep"
    assert "size" not in record["network"]["inner"]
    again = c.restore(Whole(), record, "runs/x")
    assert again == c.replace(config, {"network.inner.size": 0})
    assert hash(again) == hash(c.replace(config, {"network.inner.size": 0}))
    assert c.restore(Whole(), {}, "runs/x") == Whole()
    assert (
        c.restore(Whole(network=Deep(3)), {"network": {"type": "deep"}}, "runs/x").network == Deep()
    )
    for wrong, says in (
        ({"network": {"type": "wide"}}, "must have a type"),
        ({"network": {}}, "must have a type"),
        ({"network": 3}, "must have a type"),
        ({"data": []}, "its data must be a section"),
        ({"data": {"nam": "x"}}, "unknown config fields: data.nam"),
        ({"data": {"name": 3}}, "its data.name must be a text"),
    ):
        with pytest.raises(UserError, match=says):
            c.restore(Whole(), wrong, "runs/x")


def test_a_mark_on_a_section_holds_for_all_below_it():
    assert c.marked(Whole(), fields.MAY_CHANGE) == {
        "sampling.width", "sampling.names", "sampling.size"
    }  # fmt: skip


def test_the_help_of_a_field_is_what_its_class_says_of_it():
    rows = {path: (kind, default, text) for path, kind, default, text in c.describe(Whole())}
    assert rows["network"] == ("small|deep", "small", "")
    assert rows["extra"] == ("deep|none", "none", "")
    assert rows["network.width"] == ("int", "4", "of every layer, in units.")
    assert rows["network.names"][2] == "of its inputs, in order."
    assert "network.size" not in rows
