"""Attacks by data: a stranger's run directory or data set must not run code or write elsewhere.

Each attack would make a marker file.
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
    """A run's directory."""
    import launch

    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert launch.report([*COMMAND, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def stranger(trained, tmp_path, monkeypatch):
    """A run's directory with a module in it, which Python finds as in a notebook beside it."""
    shutil.copytree(trained, tmp_path / "run")
    marker = tmp_path / "run" / "MARKER"
    module = f"{evil_name(tmp_path)}.py"
    (tmp_path / "run" / module).write_text(EVIL.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(tmp_path / "run"))
    return tmp_path / "run"


def evil_name(folder):
    """A module's name of this test's own: TFDS imports a class only once."""
    return "evil_" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]


def record(workdir, **changes):
    path = workdir / "config.json"
    found = json.loads(path.read_text())
    found["data"]["name"] = changes.pop("name")
    path.write_text(json.dumps(found | changes))


def evil_set(root, name, version="1.0.0", form="pythonClassName", folder=None):
    """A data set whose features.json names a class of the stranger's module."""
    rows = [{"image": png(i), "note": "x"} for i in range(4)]
    evil = f"{evil_name(folder or root.parents[1])}.Feature"
    folder = store(root, lambda f: {"note": f.Text()}, {"train": rows, "test": rows}, name, version)
    text = (folder / "features.json").read_text()
    own = '"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text"'
    assert own in text
    text = text.replace(own, f'"{form}": "{evil}"')
    if form == "type":  # as earlier versions wrote it
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
    """Whether the attack failed."""
    return not list(workdir.rglob("MARKER")) and evil_name(workdir.parent) not in sys.modules


@pytest.mark.parametrize("name", ["strange", "strange:1.0.0", "tfds:strange", "mnist:1.0.0"])
@pytest.mark.parametrize("command", [("--mode=eval",), COMMAND])
def test_a_record_imports_no_class_of_a_data_set(command, name, stranger, launch_here):
    evil_set(stranger / "data", "mnist" if "mnist" in name else "strange")
    record(stranger, name=name, data_dir=str(stranger / "data"))
    before = sorted((stranger / "data").rglob("*"))
    result = launch_here(*command, f"--workdir={stranger}")
    assert safe(stranger)
    expect_one_line(result, "--data_dir=DIR|not one of TFDS's own|no data set")
    assert sorted((stranger / "data").rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["../data/strange", "/data/strange", "huggingface:strange", "strange/data_dir=data", "evil:a.b",
     "mnist/../strange", "mnist\n", "mnist/a,b=c", "captions", "images:x", "loader", 5, None],
)  # fmt: skip
def test_a_record_names_data_sets_of_tfds_alone(name, stranger, launch_here):
    evil_set(stranger / "data", "strange")
    record(stranger, name=name, data_dir=str(stranger / "data"))
    result = launch_here("--mode=eval", f"--workdir={stranger}")
    assert safe(stranger)
    expect_one_line(
        result, "not one that TFDS itself has|its data name (has a wrong type|holds control)"
    )


@pytest.mark.parametrize("form", ["pythonClassName", "python_class_name", "type"])
def test_a_data_set_that_the_user_names_imports_no_class_either(form, stranger, launch_here):
    evil_set(stranger / "data", "strange", form=form)
    arguments = ("--config.data=strange", f"--data_dir={stranger / 'data'}", "--workdir=mine")
    result = launch_here("--experiment=vae_fashion_mnist", "--debug", *arguments)
    assert safe(stranger)
    expect_one_line(
        result, "features.json names the class evil_.*Feature, which is not one of TFDS"
    )
    record(stranger, name="strange")
    result = launch_here("--mode=eval", f"--workdir={stranger}", f"--data_dir={stranger / 'data'}")
    assert safe(stranger)
    expect_one_line(result, "features.json names the class evil_.*Feature")


def test_nothing_is_prepared_or_decoded_where_a_record_says(stranger, launch_here):
    for folders in ("mnist", "mnist/3.0.1"):  # a folder that is empty, or begun
        (stranger / "data" / folders).mkdir(parents=True)
        record(stranger, name="mnist", data_dir=str(stranger / "data"))
        before = sorted((stranger / "data").rglob("*"))
        result = launch_here("--mode=eval", f"--workdir={stranger}")
        expect_one_line(result, "there is no data set mnist in")
        assert sorted((stranger / "data").rglob("*")) == before


@pytest.mark.parametrize("data_dir", [5, ["a"], "", "/no/such", "\0", {}])
def test_a_data_dir_of_a_record_that_is_no_folder_is_one_line(data_dir, stranger, launch_here):
    record(stranger, name="mnist", data_dir=data_dir)
    result = launch_here("--mode=eval", f"--workdir={stranger}")
    expect_one_line(
        result,
        "holds no mnist; give --data_dir=DIR|its data_dir (has a wrong type|holds control)",
    )


def test_sampling_needs_no_data(stranger, launch_here):
    evil_set(stranger / "data", "strange")
    record(stranger, name="strange", data_dir=str(stranger / "data"))
    result = launch_here("--mode=sample", f"--workdir={stranger}", "--num_samples=2", "--out=a.png")
    assert result.returncode == 0, result.stderr
    assert safe(stranger)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"pythonClassName": 5}', "[" * 100_000, '{"type": "a"}']
)
def test_features_that_cannot_be_read_are_one_line(content, tmp_path, launch_here):
    folder = evil_set(tmp_path, "strange", folder=tmp_path)
    (folder / "features.json").write_text(content)
    arguments = ("--config.data=strange", f"--data_dir={tmp_path}", "--workdir=mine")
    result = launch_here("--experiment=vae_fashion_mnist", "--debug", *arguments)
    expect_one_line(result, "data set strange: |no data set|its features are|no images")


def test_every_file_of_the_data_folder_is_a_source_or_listed():
    from ddpm_jax.data import loader

    for path in (ROOT / "ddpm_jax" / "data").glob("*.py"):
        is_source = "\ndef load(argument" in path.read_text()
        assert is_source == (path.stem not in loader.NO_SOURCES), path
