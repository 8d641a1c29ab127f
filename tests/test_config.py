"""Fields and sections of configs: parsing, checks, error messages and records."""

import ast
import dataclasses
import functools
import json
import types
import typing
from typing import Annotated, Literal

import pytest

from ddpm_jax import config as c
from ddpm_jax import fields
from ddpm_jax.config_records import restore, to_record
from ddpm_jax.data.types import DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import registry
from ddpm_jax.experiment import types as experiments
from ddpm_jax.experiment.command_line import describe
from ddpm_jax.experiment.registry import load_experiment, names
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.vdm import VDM
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
    shape: Annotated[tuple[int, int, int], fields.BOUND] = (1, 1, 1)


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
    ("field", "text", "message"),
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
def test_a_wrong_value_raises_one_line_with_what_is_allowed(field, text, message):
    with pytest.raises(UserError, match=message) as error:
        c.override(Config(), {field: text})
    assert "\n" not in str(error.value)


def test_a_config_is_restored_from_its_record():
    config = dataclasses.replace(Config(), widths=(3,), maybe=4)
    record = json.loads(json.dumps(to_record(config)))
    assert restore(Config, record, "runs/x") == config


def test_a_record_of_another_version_is_refused():
    record = {**to_record(Config()), "gone": 1}
    with pytest.raises(UserError, match="gone"):
        restore(Config, record, "runs/x")


def test_a_missing_field_has_its_default_and_an_unknown_field_is_an_error():
    recorded = {"steps": 7, "shape": [4, 4, 1]}
    assert restore(Config, recorded, "runs/x") == Config(steps=7, shape=(4, 4, 1))
    with pytest.raises(UserError, match="unknown config fields: colour"):
        restore(Config, {**recorded, "colour": 3}, "runs/x")


@dataclasses.dataclass(frozen=True)
class Small:
    """A small network.

    Attributes:
      width: Units of every layer.
      names: Names of the inputs,
        in order.
    """

    width: fields.Count = 4
    names: Annotated[tuple[str, ...], fields.EMPTY_ALLOWED] = ("a",)
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
    ("path", "text", "message"),
    [
        ("width", "3", "did you mean --config.network.width or --config.sampling.width"),
        ("network.widht", "3", "did you mean --config.network.width"),
        ("network.depth", "3", "a field of deep, but --config.network is small; give"),
        ("network", "q", 'there is no "q"; there are: deep, small'),
        ("sampling", "small", "has several fields; set one of them, such as --config.sampling.wid"),
        ("network.size", "3", "cannot be set"),
        ("zzz", "3", "--help lists the fields"),
        ("data.name.x", "3", "unknown field"),
    ],
)
def test_an_error_for_a_wrong_path_names_the_right_one(path, text, message):
    with pytest.raises(UserError, match=message) as error:
        c.override(Whole(), {path: text})
    assert "\n" not in str(error.value)


def test_an_empty_tuple_means_none_where_that_is_allowed():
    for text in ("none", "()", ""):
        assert c.override(Whole(), {"network.names": text}).network == Small(names=())
    with pytest.raises(UserError, match="one value or more"):
        c.override(Config(), {"widths": "()"})


def test_sections_are_restored_from_their_record_which_has_no_bound_fields():
    config = Whole(network=Deep(3, Small(5, (), size=8)), extra=Deep())
    record = json.loads(json.dumps(to_record(config)))
    assert record["network"]["type"] == "deep"
    assert "size" not in record["network"]["inner"]
    restored = restore(Whole(), record, "runs/x")
    assert restored == c.replace(config, {"network.inner.size": 0})
    assert hash(restored) == hash(c.replace(config, {"network.inner.size": 0}))
    assert restore(Whole(), {}, "runs/x") == Whole()
    assert (
        restore(Whole(network=Deep(3)), {"network": {"type": "deep"}}, "runs/x").network == Deep()
    )
    for wrong, message in (
        ({"network": {"type": "wide"}}, "must have a type"),
        ({"network": {}}, "must have a type"),
        ({"network": 3}, "must have a type"),
        ({"data": []}, "its data must be a section"),
        ({"data": {"nam": "x"}}, "unknown config fields: data.nam"),
        ({"data": {"name": 3}}, "its data.name must be a text"),
    ):
        with pytest.raises(UserError, match=message):
            restore(Whole(), wrong, "runs/x")


def test_a_mark_on_a_section_applies_to_all_of_its_fields():
    assert c.marked_paths(Whole(), fields.MAY_CHANGE) == {
        "sampling.width", "sampling.names", "sampling.size"
    }  # fmt: skip


def test_the_help_of_a_field_is_its_entry_in_the_docstring_of_its_class():
    rows = {path: (hint, default, text) for path, hint, default, text in describe(Whole())}
    chosen = "Type of this section; it decides the fields."
    assert rows["network"] == ("small|deep", "small", chosen)
    assert rows["extra"] == ("deep|none", "none", chosen)
    assert rows["network.width"] == ("int", "4", "Units of every layer.")
    assert rows["network.names"][2] == "Names of the inputs, in order."
    assert "network.size" not in rows


@pytest.mark.parametrize("name", ["data", "task"])
def test_a_record_without_a_required_section_is_damaged(name):
    config = load_experiment("vae_digits").config
    record = to_record(config)
    del record[name]
    with pytest.raises(UserError, match=f"is damaged: its {name} is missing; give another run"):
        restore(config, record, "runs/x")


# Configs of the experiments.

EXPERIMENTS = names()


@functools.cache
def variants(name, debug):
    """Return the config of an experiment, and its variants with each alternative of a section."""
    experiment = load_experiment(name)
    values = experiment.debug if debug else {}
    configs = [c.override(experiment.config, {}, values, experiment.alternatives)]
    for path, section, hint in c.sections_of(experiment.config):
        others = [c.choice_name(cls) for cls in c.alternatives_of(hint)]
        if type(None) in typing.get_args(fields.bare_type(hint)):
            others.append("none")
        for choice in others if len(others) > 1 else ():
            if choice != c.choice_name(section):
                texts, tuned = {path: choice}, experiment.alternatives
                configs.append(c.override(experiment.config, texts, values, tuned))
    return configs


def tree_of(name):
    return ast.parse((ROOT / "experiments" / f"{name}.py").read_text("utf-8"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_of_an_experiment_has_a_help_text(name):
    for config in variants(name, False):
        missing = [field.path for field in c.fields_of(config) if not field.help]
        assert not missing
        choices = {path for path, _, hint in c.sections_of(config) if c.has_choice(hint)}
        rows = describe(config)
        assert len(rows) > 10
        assert [row[0] for row in rows if not row[3] and row[0] not in choices] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_experiment_imports_another(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert (node.module or "").split(".")[0] != "experiments"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "experiments" for alias in node.names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert called not in ("import_module", "__import__", "load_experiment", "run_path")


def test_only_the_name_experiment_is_read_from_the_file_of_an_experiment(monkeypatch):
    """A file with this name alone is an experiment, and no other code imports experiments/."""
    experiment = load_experiment("vae_digits")
    module = types.SimpleNamespace(EXPERIMENT=dataclasses.replace(experiment, name=""))
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    load_experiment.cache_clear()
    try:
        assert load_experiment("vae_digits") == experiment
    finally:
        load_experiment.cache_clear()
    sources = [ROOT / "launch.py", *(ROOT / "ddpm_jax").rglob("*.py")]
    names_read = []
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not [name for name in module if (name or "").startswith("experiments")]
            if isinstance(node, ast.Attribute) and "experiments." in ast.unparse(node.value):
                names_read.append((path.name, node.attr))
    assert names_read == [("registry.py", "EXPERIMENT")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_file_of_an_experiment_defines_its_config_and_its_experiment(name):
    defined = []
    for node in tree_of(name).body:
        if isinstance(node, ast.Assign):
            defined += [target.id for target in node.targets]
    assert "CONFIG" in defined
    assert defined[-1] == "EXPERIMENT"
    assert not {"DEBUG", "Config", "build", "prepare", "network", "run"} & set(defined)


@pytest.mark.parametrize("debug", [False, True], ids=["full", "debug"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_config_restored_from_its_record_is_equal_with_an_equal_hash(name, debug):
    experiment = load_experiment(name)
    for config in variants(name, debug):
        record = json.loads(json.dumps(to_record(config)))
        restored = restore(experiment.config, record, "runs/x")
        assert restored == config
        assert hash(restored) == hash(config)
        assert to_record(restored) == to_record(config)
        assert restore(config, record, "runs/x") == config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_binding_a_config_does_not_change_its_record(name):
    """Fields that follow from the data set, the batch size or the precision are not recorded."""
    config = load_experiment(name).config
    if not isinstance(config, experiments.Config):
        config = next(iter(config.parts(ROOT / "runs").values()))
    info = DataInfo("others", (16, 16, 3), 256, 3, 5)
    bound = experiments.bind(config, info)
    assert bound != config
    assert hash(bound) != hash(config)
    assert to_record(bound) == to_record(config)
    restored = restore(config, json.loads(json.dumps(to_record(bound))), "runs/x")
    assert experiments.bind(restored, info) == bound
    assert hash(experiments.bind(restored, info)) == hash(bound)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_debug_values_belong_to_fields_of_the_config_or_an_alternative(name):
    experiment = load_experiment(name)
    known = {}
    for config in variants(name, False):
        known |= {field.path: field for field in c.fields_of(config)}
    sections = {path: hint for path, _, hint in c.sections_of(experiment.config)}
    assert experiment.debug
    for path, value in experiment.debug.items():
        if path in sections:
            assert type(value) in c.alternatives_of(sections[path]), path
            continue
        assert path in known, path
        field = known[path]
        assert not {fields.BOUND, fields.FROM_PARTS} & field.marks, path
        assert fields.from_json(value, field.hint) == value, path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tuned_alternatives_belong_to_sections_with_alternatives(name):
    experiment = load_experiment(name)
    hints = {path: hint for path, _, hint in c.sections_of(experiment.config)}
    for path, tuned in experiment.alternatives.items():
        assert path in hints, path
        for section in tuned:
            assert type(section) in c.alternatives_of(hints[path]), path
            assert type(section) is not type(c.get(experiment.config, path)), path
            chosen = c.override(
                experiment.config, {path: c.choice_name(section)}, None, experiment.alternatives
            )
            assert c.get(chosen, path) == section


@pytest.mark.parametrize("debug", [False, True], ids=["full", "debug"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_default_values_are_in_the_range_of_their_fields(name, debug):
    """The default of a field passes the check of recorded values."""
    for config in variants(name, debug):
        for field in c.fields_of(config):
            if fields.BOUND not in field.marks:
                value = fields.from_json(field.value, field.hint)
                assert (value, type(value)) == (field.value, type(field.value)), field.path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_default_values_are_parsed_from_the_text_that_help_shows(name):
    """A default as `--help` shows it can be given on the command line and changes nothing."""
    experiment = load_experiment(name)
    rows = {path: default for path, _, default, _ in describe(experiment.config)}
    texts = {path: text.strip("()").rstrip(",") or "none" for path, text in rows.items()}
    texts = {path: text.replace("'", "") for path, text in texts.items() if texts[path]}
    given = [field for field in c.fields_of(experiment.config) if field.value != ""]
    texts = {field.path: texts[field.path] for field in given if field.path in texts}
    assert len(texts) > 10
    assert c.override(experiment.config, texts) == experiment.config


def test_vdm_has_no_fields_of_the_diffusion_process_of_ddpm():
    process = {"schedule", "prediction", "variance", "times", "loss_weight", "label_dropout"}
    process |= {"vlb_weight", "flip"}
    assert process <= c.hints_of(Diffusion).keys()
    assert not process & c.hints_of(VDM).keys()
    experiment = load_experiment("vdm_digits")
    for field in sorted(process):
        with pytest.raises(UserError, match=rf"unknown field .--config\.task\.{field}."):
            c.override(experiment.config, {f"task.{field}": "1"}, {}, experiment.alternatives)


DATA = {
    "digits": DataInfo("digits", (8, 8, 1), 17, 10),
    "mnist": DataInfo("mnist", (28, 28, 1), 256, 10),
    "fashion_mnist": DataInfo("fashion_mnist", (28, 28, 1), 256, 10),
    "cifar10": DataInfo("cifar10", (32, 32, 3), 256, 10),
    "folder:images": DataInfo("folder:images", (32, 32, 3), 256, 2),
    "shapes": DataInfo("shapes", (32, 32, 3), 256, 0, 24),
}


# Alternatives that contradict another setting of the experiment, and the error message.
EXCLUDED = {
    "iddpm_cifar10": "variance=learned: needs a table of betas",
    "text_to_image_shapes": "needs an autoencoder with a codebook",
    "text_encoder_scaling": "must be a U-Net, because the channels of U-Nets are varied",
}


@pytest.mark.parametrize(
    "debug", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "debug"]
)
@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - {"generator_shapes"}))
def test_every_variant_of_an_experiment_is_bound_to_its_data_or_refused(name, debug):
    """No default, debug value or tuned alternative contradicts another, except in `EXCLUDED`."""
    refused = []
    for number, config in enumerate(variants(name, debug)):
        try:
            runs = {"": config}
            if not isinstance(config, experiments.Config):
                runs = experiments.parts_of(config, ROOT / "runs")
            bound = {part: experiments.bind(run, DATA[run.data.name]) for part, run in runs.items()}
            for part, run in bound.items():
                if not isinstance(config, experiments.Config):
                    run = config.complete(part, bound)
                assert experiments.checked_task(run).loss
        except UserError as error:
            refused.append((number, str(error)))
    assert all(number > 0 and EXCLUDED.get(name, "none") in error for number, error in refused)
    assert bool(refused) == (name in EXCLUDED)


def test_bounds_of_different_types_are_different_in_annotations():
    bounds = (fields.AtLeast, fields.MoreThan, fields.AtMost)
    assert len({bound(0.0) for bound in bounds}) == len(bounds)
    for first, second in ((a, b) for a in bounds for b in bounds):
        hints = Annotated[float, first(0.0)], Annotated[float, second(0.0)]
        assert [fields.marks_of(hint)[0] for hint in hints] == [first(0.0), second(0.0)]
    assert fields.parse("0", fields.NonNegative) == 0.0
    with pytest.raises(ValueError, match="more than 0"):
        fields.parse("0", fields.Positive)
