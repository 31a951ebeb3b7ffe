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
from tests import ROOT

PACKAGE = ROOT / "vera_tools"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The packages, and the modules beside them, from the ground up. Each imports from the levels below its own, and of its
# own level from itself alone.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version", "dtypes", "blas", "conformity", "installed", "memo", "texts"),
    ("schema", "report", "parts", "processes"),
    ("pages",),
    ("listing",),
    ("projections",),
    ("platforms", "files"),
    ("architectures",),
    ("checkpoints",),
    ("verifying",),
    ("comparing", "converting"),
    ("merging", "drifting", "hub", "nn", "serving"),
    ("cli", "testing"),
    ("__main__", ""),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


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
    for node in statements(ast.parse(path.read_text("utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def every_import(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name in it) of every import in the file, wherever it stands: in functions too, and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, by their names within it."""
    found = set()
    for module, name in every_import(path):
        if module == "vera_tools" or module.startswith("vera_tools."):
            inside = module.removeprefix("vera_tools").removeprefix(".")
            full = f"{inside}.{name}".strip(".")
            found.add(full if full in MODULES else inside)
    return found - {""}


def package(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_imports_point_down(name):
    for other in own_imports(MODULES[name]) - {"_version"}:
        same = package(other) == package(name)
        assert same or LEVEL[package(other)] < LEVEL[package(name)], f"{name} imports {other}"


def test_imports_go_round_in_no_circle():
    graph = {name: own_imports(path) - {name} for name, path in MODULES.items() if name}
    # A package is there before its parts: the parts may name it.
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in graph.items()}
    done: set[str] = set()
    while ready := {name for name, others in graph.items() if name not in done and others <= done}:
        done |= ready
    assert {name: others - done for name, others in graph.items() if name not in done} == {}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_private_name_stays_in_its_package(name):
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    aliases = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("vera_tools"):
            continue
        inside = str(node.module).removeprefix("vera_tools").removeprefix(".")
        for alias in node.names:
            full = f"{inside}.{alias.name}".strip(".")
            if full in MODULES:
                aliases[alias.asname or alias.name] = full
            elif package(inside) != package(name) and inside != "_version":
                assert not alias.name.startswith("_"), f"{name} imports {alias.name} of {inside}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            other = aliases[node.value.id]
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert package(other) == package(name) or not private, f"{name} uses {other}.{node.attr}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_nn_imports_torch_and_only_the_witness_safetensors(name):
    roots = {imported.split(".")[0] for imported in imports(MODULES[name])}
    forbidden = {"peft", "transformers", "safetensors", "accelerate", "torch", "vllm"}
    allowed = {"torch"} if name.startswith("nn") else {"safetensors"} if name == "files.safetensors_library" else set()
    if name == "nn.trainer":  # its callback is one of transformers'
        allowed.add("transformers")
    assert roots & forbidden <= allowed


CAPABILITIES = ("verifying", "converting", "comparing", "merging", "drifting", "hub", "serving")
SCRIPTS = ("drifting.probe", "drifting.logits")  # run by path in a process of their own, and print what they found


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] in CAPABILITIES and n not in SCRIPTS))
def test_a_capability_neither_prints_nor_exits(name):
    leaving = {"sys.exit", "exit", "os._exit"}
    if name == "processes.forking":  # whose copies of the process end there
        leaving.remove("os._exit")
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"print", "click.echo", *leaving}


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_but_nn_is_imported_without_torch_and_shadows_no_function():
    names = [f"vera_tools.{name}" for name in MODULES if name and name != "__main__" and not name.startswith("nn")]
    program = f"""
import importlib, inspect, json, sys
for missing in ("torch", "peft", "transformers", "accelerate"):
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
        tree = ast.parse(MODULES[home].read_text("utf-8"))
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
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 500
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py")


def test_the_tests_files_are_short_too():
    assert {str(path.relative_to(ROOT)) for path in TESTS if len(path.read_text("utf-8").splitlines()) > 500} == set()


def test_no_test_module_is_imported():
    """What two test modules need lies in a module beside them: pytest would collect the one's tests in the other."""
    for path in TESTS:
        for module, name in every_import(path):
            parts = f"{module}.{name}".split(".")
            assert parts[0] != "tests" or not any(p.startswith("test_") for p in parts), f"{path.name}: {module}"


def test_every_schema_is_one_and_names_itself():
    import jsonschema

    for path in sorted((ROOT / "schemas").glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        jsonschema.Draft202012Validator.check_schema(document)
        name, version = path.name.removesuffix(".schema.json").rsplit(".", 1)
        assert document["$id"] == f"urn:vera-tools:{name}:{version}"
