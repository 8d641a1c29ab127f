"""Both notebooks, executed cell by cell with tiny trainings, by this very Python."""

import base64
import io
import json
import sys

import nbformat
import numpy as np
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from PIL import Image

from helpers.launching import ROOT, user_environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class ThisPython(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, whatever kernels are registered."""

    @property
    def kernel_spec(self):
        launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=launch, display_name="this Python", language="python")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute("tour.ipynb") -> its code cells by their ids, executed in an empty folder.

    Args:
      form: a replacement in the notebook's form, (what is there, what is to be).
    """
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))

    def run(name, form=None):
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        if form is not None:
            (cell,) = (cell for cell in notebook.cells if cell.id == "form")
            assert form[0] in cell.source
            cell.source = cell.source.replace(*form)
        client = NotebookClient(notebook, timeout=240, kernel_manager_class=ThisPython)
        environment = user_environment(
            DDPM_JAX_DEBUG="1", PYTHONPATH=str(ROOT), IPYTHONDIR=str(tmp_path / "ipython")
        )
        client.execute(env=environment, cwd=str(tmp_path))
        return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}

    return run


def said(cell):
    """All that a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """The pictures that a cell shows, as arrays."""
    found = [
        output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_the_tour_runs_and_every_figure_is_shown(execute, tmp_path):
    cells = execute("tour.ipynb")  # whose own asserts hold the equations
    drawing = {name: cell for name, cell in cells.items() if "show(figure)\n" in cell.source + "\n"}
    drawing.pop("setup-import", None)  # which defines it
    assert len(drawing) >= 14
    for name, cell in drawing.items():
        (picture,) = pictures(cell)
        assert picture.std() > 0, name
    for run in ("vae_digits", "ddpm_digits"):
        assert (tmp_path / "runs" / "tour-debug" / run / "summary.json").exists()


@pytest.mark.parametrize(
    "experiment", ["vae_mnist", pytest.param("ddpm_mnist", marks=pytest.mark.slow)]
)
def test_the_colab_notebook_is_cut_off_goes_on_and_draws(experiment, execute, tmp_path):
    line = 'EXPERIMENT = "{}"'
    cells = execute("train_on_colab.ipynb", (line.format("ddpm_mnist"), line.format(experiment)))
    workdir = tmp_path / "runs" / f"{experiment}-debug"
    assert "the same command resumes the run" in said(cells["rehearsal"])
    assert "resuming at step" in said(cells["train"])
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["experiment"] == experiment
    assert (
        summary["step"]
        == json.loads((workdir / "config.json").read_text())["config"]["train"]["steps"]
    )
    for metric in summary["metrics"]:
        assert metric.endswith("_error") or metric in said(cells["results"])
    assert len(pictures(cells["results"])) == 3  # curves, samples and another
    assert pictures(cells["sample"])[0].std() > 0
    assert (workdir / "results.zip").exists()


def test_a_command_that_fails_fails_the_colab_notebook(capsys):
    notebook = nbformat.read(ROOT / "notebooks" / "train_on_colab.ipynb", as_version=4)
    (install,) = (cell.source for cell in notebook.cells if cell.id == "install")
    defined = {}
    exec(install, defined)
    with pytest.raises(RuntimeError, match="exit code 2"):
        defined["call"](sys.executable, "launch.py", "--experiment=ddpm_mnits", cwd=defined["ROOT"])
    assert 'there is no "ddpm_mnits"' in capsys.readouterr().out
