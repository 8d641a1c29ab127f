"""The rules about packages and imports, checked by parsing the source files."""

import ast
import builtins
import functools
import symtable

import pytest

from helpers.launching import ROOT

TESTS = ROOT / "tests"
FILES = sorted((ROOT / "ddpm_jax").rglob("*.py"))
ORDER = (  # lowest first; a module imports from the same line or from a lower one
    ("errors", "system", "fields", "config", "config_records", "rng"),
    ("diffusion", "variational"),
    ("nn",),
    ("data", "parallel", "plots"),
    ("progress",),
    ("metrics",),
    ("task",),
    ("tasks", "training"),
    ("experiment",),
)
LINES = {name: number for number, names in enumerate(ORDER) for name in names}
INDEPENDENT = {"tasks", "training"}  # on the same line, but neither imports the other
LONGEST_CHAIN = 8


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """Yield every module or name that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def modules_of_package(module):
    """Return the modules, without the `__init__.py` files, that a module imports."""
    names = set(imports(MODULES[module])) & set(MODULES) - {module}
    return {name for name in names if MODULES[name].name != "__init__.py"}


def folder(module):
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "ddpm_jax"])
def test_imports_go_downward_only(module):
    for imported in modules_of_package(module):
        importer, source = folder(module), folder(imported)
        assert LINES[importer] >= LINES[source], f"{module} imports {imported}"
        assert {importer, source} != INDEPENDENT, f"{module} imports {imported}"


def test_the_order_names_every_folder_and_file():
    names = {path.name.removesuffix(".py") for path in (ROOT / "ddpm_jax").iterdir()}
    assert set(LINES) >= names - {"__init__", "__pycache__"}


def test_there_is_no_cycle_of_imports():
    done = set()

    def visit(module, path):
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for imported in modules_of_package(module):
                visit(imported, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_the_longest_chain_of_imports_has_eight_modules():
    @functools.cache
    def chain(module):
        """Return the longest chain of imports that ends with `module`."""
        return (*max(map(chain, modules_of_package(module)), key=len, default=()), module)

    # The `__init__.py` of the package exports `load_run` and is exempt.
    chains = [chain(module) for module in MODULES if module != "ddpm_jax"]
    assert len(max(chains, key=len)) <= LONGEST_CHAIN


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_library_imports_no_experiment_and_no_launcher(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("experiments", "launch")}


def test_maths_imports_only_jax_numpy_and_jaxtyping():
    for path in FILES:
        if path.parent.name in ("diffusion", "variational"):
            allowed = {"jax", "jaxtyping", "ddpm_jax", "typing", "collections", "numpy", "math"}
            allowed |= {"dataclasses"}
            allowed |= {"diffrax"} if path.stem == "probability_flow" else set()
            imported = {name.split(".")[0] for name in imports(path)}
            assert imported <= allowed, f"{path.name} imports {imported - allowed}"


def test_data_never_imports_jax():
    for path in (ROOT / "ddpm_jax" / "data").glob("*.py"):
        names = {imported.split(".")[0] for imported in imports(path)}
        assert not names & {"jax", "flax", "jaxtyping"}, path


def test_only_checkpoint_imports_orbax_and_only_parallel_uses_devices():
    users = {module_of(p) for p in FILES if any(i.startswith("orbax") for i in imports(p))}
    assert users == {"ddpm_jax.training.checkpoint"}
    for path in FILES:
        if path.parent.name != "parallel":
            text = path.read_text()
            for word in ("pmap", "make_mesh", "NamedSharding", "jax.devices"):
                assert word not in text, f"{path} uses devices: {word}"


def test_no_file_postpones_annotations_which_jaxtyping_reads():
    for path in FILES:
        assert "from __future__ import annotations" not in path.read_text()


def test_the_folders_of_tests_mirror_the_packages():
    tests = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")}
    package = {path.parent.relative_to(ROOT / "ddpm_jax").as_posix() for path in FILES}
    assert tests - {"helpers"} <= package


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.stem)
def test_no_test_file_is_imported(path):
    imported = {name.split(".")[0] for name in imports(path)}
    assert not [name for name in imported if name.startswith(("test_", "conftest"))]


def test_launch_imports_no_slow_package_at_the_top():
    top = set()
    for node in ast.parse((ROOT / "launch.py").read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            top |= {getattr(node, "module", None) or node.names[0].name}
    assert not {name.split(".")[0] for name in top} & {"jax", "flax", "numpy", "matplotlib"}


def unbound(table, module):
    """Yield (function or class, name) for each name that is read but not defined."""
    defined = {*module, *dir(builtins), "__file__"}
    for symbol in table.get_symbols():
        if symbol.is_referenced() and symbol.is_global() and symbol.get_name() not in defined:
            yield table.get_name(), symbol.get_name()
    for child in table.get_children():
        yield from unbound(child, module)


@pytest.mark.parametrize("folder", ["ddpm_jax", "experiments", "tests", "benchmarks", "."])
def test_every_name_is_defined(folder):
    """Ruff and mypy do not check this, because the shapes in annotations are strings of names."""
    pattern = "*.py" if folder == "." else "**/*.py"
    for path in (ROOT / folder).glob(pattern):
        table = symtable.symtable(path.read_text(), str(path), "exec")
        names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
        names |= {s.get_name() for s in table.get_symbols() if s.is_namespace()}
        assert not list(unbound(table, names)), path
