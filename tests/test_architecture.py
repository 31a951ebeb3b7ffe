"""Rules about the source itself: which way imports point, who may import torch, how long a file may be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vera_tools
from tests.conftest import ROOT

PACKAGE = ROOT / "vera_tools"
FILES = sorted(PACKAGE.rglob("*.py"))

# What everything stands on. Each imports from those before it alone.
FOUNDATION = [
    "errors",
    "_version",
    "dtypes",
    "recipe",
    "prng",
    "schema",
    "source",
    "atomic",
    "expressions",
    "config",
    "tensorfile",
    "manifest",
    "base",
    "checkpoint",
    "identification",
    "projections",
    "writing",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when the module is imported, the bodies of functions left out, and what only a type checker reads."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from statements([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
        else:
            yield node


def imports(path: Path) -> set[str]:
    """Full names of the modules that this file imports when it is imported."""
    found = set()
    for node in statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, by their names within it."""
    names = {name.removeprefix("vera_tools.") for name in imports(path) if name.startswith("vera_tools.")}
    return names & set(MODULES)


@pytest.mark.parametrize("name", FOUNDATION)
def test_the_foundation_imports_from_below_only(name):
    before = set(FOUNDATION[: FOUNDATION.index(name)])
    assert own_imports(MODULES[name]) <= before


def test_imports_go_round_in_no_circle():
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    # A package is there before its parts: the parts may name it.
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in graph.items()}
    done: set[str] = set()
    while ready := {name for name, others in graph.items() if name not in done and others <= done}:
        done |= ready
    assert set(graph) - done == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_command_line_and_torch_stand_at_the_edge(name):
    inside = name.split(".")[0]
    for other in own_imports(MODULES[name]):
        if inside not in ("cli", "__main__"):
            assert other.split(".")[0] != "cli", f"{name} imports the command line"
        if inside != "nn":
            assert other.split(".")[0] != "nn", f"{name} imports torch by way of {other}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_nn_imports_torch(name):
    roots = {imported.split(".")[0] for imported in imports(MODULES[name])}
    forbidden = {"peft", "transformers", "safetensors", "accelerate"} | (set() if name.startswith("nn") else {"torch"})
    assert roots & forbidden == set()


CAPABILITIES = ("verifying", "converting", "comparing", "merging", "drifting", "hub")
SCRIPTS = ("drifting.probe", "drifting.logits")  # run by path in a process of their own, and print what they found


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] in CAPABILITIES and n not in SCRIPTS))
def test_a_capability_neither_prints_nor_exits(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "sys.exit", "exit", "os._exit", "click.echo")


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_but_nn_is_imported_without_torch_and_shadows_no_function():
    names = [f"vera_tools.{name}" for name in MODULES if name and name != "__main__" and not name.startswith("nn")]
    program = f"""
import importlib, inspect, json, sys
for missing in ("torch", "peft", "transformers", "safetensors", "accelerate"):
    sys.modules[missing] = None
import vera_tools
for name in {names!r}:
    importlib.import_module(name)
print(json.dumps({{
    name: inspect.ismodule(getattr(vera_tools, name)) for name in vera_tools.__all__
    if vera_tools._HOMES.get(name, "").split(".")[0] != "nn"
}}))
"""
    kinds = json.loads(run(program))
    assert len(kinds) > 5
    assert not any(kinds.values()), kinds


def test_no_module_bears_a_public_name():
    assert set(vera_tools.__all__) & {name.split(".")[0] for name in MODULES} == set()


def test_every_public_name_has_a_home():
    for name, home in vera_tools._HOMES.items():
        tree = ast.parse(MODULES[home].read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in names | {imported.rsplit(".", 1)[-1] for imported in imports(MODULES[home])}, name
    assert set(dir(vera_tools)) == set(vera_tools.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vera_tools.nothing


def test_importing_the_package_imports_nothing_else():
    heavy = "{'torch', 'numpy', 'click', 'rich', 'jsonschema', 'huggingface_hub', 'ml_dtypes'}"
    assert run(f"import sys, vera_tools; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_looking_up_a_name_imports_no_torch():
    program = "import sys, vera_tools as v; v.verify; v.identify; v.Recipe; print('torch' in sys.modules)"
    assert run(program) == "False\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_of_one_topic_and_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 500
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py")


def test_every_schema_is_one_and_names_itself():
    import jsonschema

    for path in sorted((ROOT / "schemas").glob("*.json")):
        document = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(document)
        name, version = path.name.removesuffix(".schema.json").rsplit(".", 1)
        assert document["$id"] == f"urn:vera-tools:{name}:{version}"
