"""The house's rules about who imports whom, held by walking the imports."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "ddpm_jax").rglob("*.py"))
MATHS = {
    "bayes", "elbo", "guidance", "loss", "prediction", "process", "sampler", "schedule", "vae",
    "vq",
}  # fmt: skip
LEVELS = {
    "tokens": 0,
    "tasks": 3,
    "classifier": 4,
    "metrics": 5,
    "drawing": 5,
    "vdm": 7,
    "gallery": 6,
    "diffusion": 6,
    "autoencoder": 6,
    "contrastive": 6,
    "generation": 7,
    "text_to_image": 8,
    "train": 8,
    "preflight": 9,
    "run": 9,
    "judge": 10,
    "guide": 10,
    "parts": 10,
}  # maths 0, nn 1, the rest 2


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(module):
    name = module.removeprefix("ddpm_jax.")
    if name.split(".")[0] in MATHS:
        return 0
    if name.startswith("nn"):
        return 1
    return LEVELS.get(name.split(".")[0], 2)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_downward_only(path):
    here = module_of(path)
    modules = {module_of(other) for other in FILES}
    for imported in set(imports(path)) & modules - {"ddpm_jax", here}:
        if imported.split(".")[1] in ("errors", "config"):
            continue  # they import nothing and anything may raise or describe
        allowed = level(here) >= level(imported)
        assert allowed, f"{here} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_library_imports_no_experiment_and_no_launcher(path):
    assert not {name for name in imports(path) if name.split(".")[0] in ("experiments", "launch")}


def test_maths_imports_jax_and_jaxtyping_alone():
    for path in FILES:
        name = module_of(path).removeprefix("ddpm_jax.")
        if name in MATHS:
            allowed = {"jax", "jaxtyping", "ddpm_jax", "typing", "collections"}
            allowed |= {"numpy", "math"} if name == "schedule" else set()
            found = {imported.split(".")[0] for imported in imports(path)}
            assert found <= allowed, f"{name} imports {found - allowed}"


def test_data_never_imports_jax():
    for path in (ROOT / "ddpm_jax" / "data").glob("*.py"):
        names = {imported.split(".")[0] for imported in imports(path)}
        assert not names & {"jax", "flax", "jaxtyping"}, path


def test_one_file_imports_orbax_and_one_knows_devices():
    users = {module_of(p) for p in FILES if any(i.startswith("orbax") for i in imports(p))}
    assert users == {"ddpm_jax.checkpoint"}
    for path in FILES:
        if module_of(path) != "ddpm_jax.parallel":
            text = path.read_text()
            for word in ("pmap", "make_mesh", "NamedSharding", "jax.devices"):
                assert word not in text, f"{path} knows devices: {word}"


def test_nothing_postpones_annotations_beside_jaxtyping():
    for path in FILES:
        assert "from __future__ import annotations" not in path.read_text()


def test_wrong_flags_and_help_import_nothing_heavy():
    top = set()
    for node in ast.parse((ROOT / "launch.py").read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            top |= {getattr(node, "module", None) or node.names[0].name}
    assert not {name.split(".")[0] for name in top} & {"jax", "flax", "numpy", "matplotlib"}
