"""The examples in the docstrings of the package."""

import ast
import doctest
import importlib

import pytest

from helpers.launching import ROOT

PATHS = [path for path in sorted(ROOT.glob("ddpm_jax/**/*.py")) if ">>> " in path.read_text()]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def examples(path, module):
    """The examples of a file; DocTestFinder does not find functions that jaxtyping decorates."""
    parser = doctest.DocTestParser()
    for node in ast.walk(ast.parse(path.read_text())):
        text = isinstance(node, DOCUMENTED) and ast.get_docstring(node)
        if text and ">>> " in text:
            name = f"{module.__name__}.{getattr(node, 'name', '')}"
            line = getattr(node, "lineno", 1) - 1
            yield parser.get_doctest(text, vars(module).copy(), name, str(path), line)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_of_a_module_return_what_they_show(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    tests, report = list(examples(path, module)), []
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    assert sum(len(test.examples) for test in tests) == path.read_text().count(">>> ")
