"""Untrusted run directories and data sets cannot run code or write files elsewhere.

Each attack creates a marker file if it succeeds.
"""

import hashlib
import json
import shutil
import sys

import pytest

from helpers.data_sets import png, store
from helpers.launching import ROOT, expect_one_line

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from tensorflow_datasets.core import features
class Feature(features.Text):
    pass
"""
COMMAND = ("--experiment=vae_digits", "--debug", "--config.train.steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run directory."""
    import launch

    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert launch.report([*COMMAND, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def untrusted(trained, tmp_path, monkeypatch):
    """Return an untrusted run directory with a module that is in Python's path."""
    shutil.copytree(trained, tmp_path / "run")
    marker = tmp_path / "run" / "MARKER"
    module = f"{evil_name(tmp_path)}.py"
    (tmp_path / "run" / module).write_text(EVIL.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path / "run"))
    return tmp_path / "run"


def evil_name(folder):
    """Return a module name that no other test uses, because TFDS imports a class only once."""
    return "evil_" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]


def record(workdir, **changes):
    path = workdir / "config.json"
    content = json.loads(path.read_text())
    content["data"]["name"] = changes.pop("name")
    path.write_text(json.dumps(content | changes))


def evil_set(root, name, version="1.0.0", form="pythonClassName", folder=None):
    """Store a data set whose features.json names a class of the untrusted module."""
    rows = [{"image": png(i), "note": "x"} for i in range(4)]
    evil = f"{evil_name(folder or root.parents[1])}.Feature"
    folder = store(root, lambda f: {"note": f.Text()}, {"train": rows, "test": rows}, name, version)
    text = (folder / "features.json").read_text()
    original = '"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text"'
    assert original in text
    text = text.replace(original, f'"{form}": "{evil}"')
    if form == "type":  # the format of earlier versions of TFDS
        note = {"type": evil, "content": {}}
        image = {
            "type": "tensorflow_datasets.core.features.image_feature.Image",
            "content": {"shape": [8, 8, 3], "dtype": "uint8", "encoding_format": "png"},
        }
        kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        text = json.dumps({"type": kind, "content": {"image": image, "note": note}})
    (folder / "features.json").write_text(text)
    return folder


def safe(workdir):
    """Return whether the attack has failed."""
    return not list(workdir.rglob("MARKER")) and evil_name(workdir.parent) not in sys.modules


@pytest.mark.parametrize("name", ["strange", "strange:1.0.0", "tfds:strange", "mnist:1.0.0"])
@pytest.mark.parametrize("command", [("--mode=eval",), COMMAND])
def test_a_record_cannot_import_a_class_of_a_data_set(command, name, untrusted, launch_here):
    evil_set(untrusted / "data", "mnist" if "mnist" in name else "strange")
    record(untrusted, name=name, data_dir=str(untrusted / "data"))
    before = sorted((untrusted / "data").rglob("*"))
    result = launch_here(*command, f"--workdir={untrusted}")
    assert safe(untrusted)
    expect_one_line(result, "--data_dir=DIR|is not part of TFDS|no data set")
    assert sorted((untrusted / "data").rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["../data/strange", "/data/strange", "huggingface:strange", "strange/data_dir=data", "evil:a.b",
     "mnist/../strange", "mnist\n", "mnist/a,b=c", "captions", "images:x", "loader", 5, None],
)  # fmt: skip
def test_a_record_can_only_name_data_sets_of_tfds(name, untrusted, launch_here):
    evil_set(untrusted / "data", "strange")
    record(untrusted, name=name, data_dir=str(untrusted / "data"))
    result = launch_here("--mode=eval", f"--workdir={untrusted}")
    assert safe(untrusted)
    expect_one_line(
        result, "is not part of TFDS|the value of data name (has a wrong type|holds control)"
    )


@pytest.mark.parametrize("form", ["pythonClassName", "python_class_name", "type"])
def test_a_data_set_that_the_user_names_cannot_import_a_class(form, untrusted, launch_here):
    evil_set(untrusted / "data", "strange", form=form)
    arguments = ("--config.data=strange", f"--data_dir={untrusted / 'data'}", "--workdir=mine")
    result = launch_here("--experiment=vae_fashion_mnist", "--debug", *arguments)
    assert safe(untrusted)
    expect_one_line(
        result, "features.json names the class evil_.*Feature, which is not part of TFDS"
    )
    record(untrusted, name="strange")
    result = launch_here(
        "--mode=eval", f"--workdir={untrusted}", f"--data_dir={untrusted / 'data'}"
    )
    assert safe(untrusted)
    expect_one_line(result, "features.json names the class evil_.*Feature")


def test_a_record_cannot_make_a_run_prepare_a_data_set(untrusted, launch_here):
    for folders in (
        "mnist",
        "mnist/3.0.1",
    ):  # an empty directory, or one of an interrupted preparation
        (untrusted / "data" / folders).mkdir(parents=True)
        record(untrusted, name="mnist", data_dir=str(untrusted / "data"))
        before = sorted((untrusted / "data").rglob("*"))
        result = launch_here("--mode=eval", f"--workdir={untrusted}")
        expect_one_line(result, "there is no data set mnist in")
        assert sorted((untrusted / "data").rglob("*")) == before


@pytest.mark.parametrize("data_dir", [5, ["a"], "", "/no/such", "\0", {}])
def test_an_invalid_data_dir_of_a_record_is_an_error_of_one_line(data_dir, untrusted, launch_here):
    record(untrusted, name="mnist", data_dir=data_dir)
    result = launch_here("--mode=eval", f"--workdir={untrusted}")
    expect_one_line(
        result,
        "does not contain mnist; give --data_dir|data_dir (has a wrong type|holds control)",
    )


def test_sampling_needs_no_data(untrusted, launch_here):
    evil_set(untrusted / "data", "strange")
    record(untrusted, name="strange", data_dir=str(untrusted / "data"))
    result = launch_here(
        "--mode=sample", f"--workdir={untrusted}", "--num_samples=2", "--out=a.png"
    )
    assert result.returncode == 0, result.stderr
    assert safe(untrusted)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"pythonClassName": 5}', "[" * 100_000, '{"type": "a"}']
)
def test_features_that_cannot_be_read_are_an_error_of_one_line(content, tmp_path, launch_here):
    folder = evil_set(tmp_path, "strange", folder=tmp_path)
    (folder / "features.json").write_text(content)
    arguments = ("--config.data=strange", f"--data_dir={tmp_path}", "--workdir=mine")
    result = launch_here("--experiment=vae_fashion_mnist", "--debug", *arguments)
    expect_one_line(result, "data set strange cannot be |no data set|its features are|no images")


def test_every_module_of_the_data_package_is_a_source_or_in_no_sources():
    from ddpm_jax.data import loader

    for path in (ROOT / "ddpm_jax" / "data").glob("*.py"):
        is_source = "\ndef load(argument" in path.read_text()
        assert is_source == (path.stem not in loader.NOT_SOURCES), path
