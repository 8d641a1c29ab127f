"""Links, commands and code of the documents, and imports of the benchmarks."""

import ast
import importlib
import re
import shlex

import pytest

import ddpm_jax
from ddpm_jax.config import override
from ddpm_jax.experiment.command_line import FLAGS, define_flags, parse
from ddpm_jax.experiment.registry import load_experiment, names
from helpers.launching import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
IN_EXAMPLES = ("NAME", "vae_eight", "beta_digits")  # experiments that the documents define


def name(path):
    return str(path.relative_to(ROOT))


def anchors(text):
    """Return the anchors that GitHub derives from the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_point_to_existing_files_and_headings(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT.resolve()), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_in_documents_has_no_syntax_error(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        ast.parse(re.sub(r"^    \.\.\.$", "", block, flags=re.MULTILINE))


def test_the_readme_has_the_line_that_tests_the_project():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len([line for line in lines if re.match(r"python3 -m venv .*pytest$", line)]) == 1


def test_the_version_of_the_citation_is_that_of_the_package():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == ddpm_jax.__version__


def test_every_image_of_the_documents_is_shown():
    shown = " ".join(path.read_text() for path in DOCUMENTS)
    assert not [image for image in (ROOT / "docs/images").iterdir() if image.name not in shown]


def commands():
    """Yield the arguments of every `launch.py` command in the documents and the experiments."""
    for path in [*DOCUMENTS, *sorted(ROOT.glob("experiments/*.py"))]:
        text = re.sub(r"\\+\n *", "", path.read_text())
        for line in re.findall(r"launch\.py (--[^`\n]*)", text):
            if line.count('"') % 2:  # the quote belongs to the command of another program
                line = line.removesuffix('"')
            words = shlex.split(line, comments=True)
            if not {f"--experiment={name}" for name in IN_EXAMPLES} & set(words):
                yield [word for word in words if word not in ("&", "--help")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=name)
def test_the_names_that_a_benchmark_imports_exist(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "module")]
    imports = [node for node in nodes if node.module.startswith("ddpm_jax")]
    assert imports
    for node in imports:
        for alias in node.names:
            if not hasattr(importlib.import_module(node.module), alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


def test_the_fields_and_flags_of_every_command_exist():
    all_arguments = list(commands())
    assert len(all_arguments) > 60
    for arguments in all_arguments:
        define_flags()
        overrides = parse(arguments)
        name = FLAGS.experiment or (FLAGS.workdir or "").removeprefix("runs/")
        if name in names():
            experiment = load_experiment(name)
            override(experiment.config, overrides, None, experiment.alternatives)
