"""Change the code in one place at a time, and see whether a test fails: the mutation score, of a sample.

    python -m tests.mutants                                  # 25 changes of each subject, drawn with seed 0
    python -m tests.mutants rounding --sample 60 --seed 5

A change turns one operator, constant, condition or statement into another: ``<`` into ``<=``, ``and`` into ``or``,
``n`` into ``n + 1``, a ``raise`` or a call into nothing. It is made in a copy of the working tree, and the tests of its
package run until one fails. A change that none notices is printed as the line before and after. Some of them change
nothing that can be noticed: those are read, and not counted away.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import ROOT


class Subject(NamedTuple):
    """Which code is changed, and which tests must notice."""

    code: tuple[str, ...]
    tests: tuple[str, ...]


SUBJECTS = {
    "projections": Subject(("projections/*.py",), ("tests/projections",)),
    "files": Subject(("files/*.py",), ("tests/files",)),
    "verifying": Subject(("verifying/*.py",), ("tests/verifying",)),
    "rounding": Subject(
        tuple(f"merging/{name}.py" for name in ("arithmetic", "exact", "rounding", "values", "verification")),
        ("tests/merging/test_rounding.py", "tests/merging/test_values.py"),
    ),
}
#: What the tests need of the working tree beside the code.
COPIED = ("vera_tools", "tests", "fuzz", "schemas", "docs", "examples", "pyproject.toml")
LINKED = ("fixtures", "benchmarks", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "action.yml")

_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Add,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip


class Change(NamedTuple):
    """One place of one file, with what stands there and what would."""

    file: Path
    line: int
    before: str
    after: str
    source: str


class _Changer(ast.NodeTransformer):
    """Visits every place that can be changed in the same order, and changes one of them; with -1 it counts them."""

    def __init__(self, chosen: int) -> None:
        self.chosen, self.count = chosen, 0
        self.found: tuple[int, str, str] | None = None

    def _offer(self, node: ast.AST, new: ast.AST) -> ast.AST:
        self.count += 1
        if self.count - 1 != self.chosen:
            return node
        self.found = getattr(node, "lineno", 0), ast.unparse(node), ast.unparse(new)
        return ast.copy_location(new, node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        other = _OTHER.get(type(node.ops[0]))
        if other is None:
            return node
        return self._offer(node, ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = _OTHER.get(type(node.op))
        return self._offer(node, ast.BinOp(node.left, other(), node.right)) if other else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, ast.BoolOp(_OTHER[type(node.op)](), node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, node.operand) if isinstance(node.op, ast.Not | ast.USub | ast.Invert) else node

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return node
        self.generic_visit(node)
        node.test = self._offer(node.test, ast.UnaryOp(ast.Not(), node.test))
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return self._offer(node, ast.Constant(not node.value))
        if isinstance(node.value, int | float):
            return self._offer(node, ast.Constant(node.value + 1))
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._offer(node, ast.Pass())  # and nothing inside it: it is a message

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):
            return node  # documentation
        self.generic_visit(node)
        return self._offer(node, ast.Pass()) if isinstance(node.value, ast.Call) else node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is None or isinstance(node.value, ast.Constant):
            return node
        return self._offer(node, ast.Return(ast.Constant(None)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node  # a message, mostly

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return node  # an annotation

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]
        node.args = self.visit(node.args)
        return node


def drawn(subject: Subject, count: int, rng: random.Random) -> list[Change]:
    """A sample of a subject's changes."""
    code, places = ROOT / "vera_tools", list[tuple[Path, int]]()
    for file in sorted(file for pattern in subject.code for file in code.glob(pattern)):
        counter = _Changer(-1)
        counter.visit(ast.parse(file.read_text("utf-8")))
        places += [(file, number) for number in range(counter.count)]
    return [_change(*place) for place in sorted(rng.sample(places, min(count, len(places))))]


def _change(file: Path, number: int) -> Change:
    changer = _Changer(number)
    tree = ast.fix_missing_locations(changer.visit(ast.parse(file.read_text("utf-8"))))
    assert changer.found is not None
    return Change(file, *changer.found, source=ast.unparse(tree))


def tests_of(subject: Subject, file: Path | None) -> list[str]:
    """The files of a subject's tests; first those that are named like the file that is changed."""
    found = [
        path
        for name in subject.tests
        for path in (sorted((ROOT / name).glob("test_*.py")) if (ROOT / name).is_dir() else [ROOT / name])
    ]
    first = sorted(found, key=lambda path: file is None or file.stem.split("_")[0] not in path.stem)
    return [path.relative_to(ROOT).as_posix() for path in first]


class Copy:
    """A copy of the working tree in which a change is made, tested and taken back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
            else:
                shutil.copy2(source, folder / name)
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        self._environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run([sys.executable, "-m", "compileall", "-q", *map(str, (folder / "vera_tools", folder / "tests"))])

    def passes(self, tests: list[str], *, within: float | None = None) -> bool:
        """Whether all of these tests pass; what takes longer than `within` seconds does not."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self._environment, capture_output=True, check=False, timeout=within
            )
        except subprocess.TimeoutExpired:
            return False
        if done.returncode not in (0, 1, 2):
            sys.exit(
                f"pytest ended with {done.returncode}: {done.stdout.decode()[-2000:]}{done.stderr.decode()[-500:]}"
            )
        return done.returncode == 0

    def notices(self, change: Change, tests: list[str], *, within: float) -> bool:
        """Whether a test fails after a change."""
        file = self.folder / change.file.relative_to(ROOT)
        text = file.read_bytes()
        for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            cached.unlink()
        file.write_text(change.source, "utf-8")
        try:
            return not self.passes(tests, within=within)
        finally:
            file.write_bytes(text)


def main() -> int:
    """Draw, change, test, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="what is changed (default: each)")
    parser.add_argument("--sample", type=int, default=25, help="changes of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vera-tools-mutants-") as folder:
        copy = Copy(Path(folder))
        for name in options.subjects or SUBJECTS:
            subject = SUBJECTS[name]
            begun = time.monotonic()
            if not copy.passes(tests_of(subject, None)):
                sys.exit(f"{name}: its tests fail before anything is changed")
            usual, noticed = time.monotonic() - begun, 0
            sample = drawn(subject, options.sample, random.Random(f"{name} {options.seed}"))
            for change in sample:
                if copy.notices(change, tests_of(subject, change.file), within=10 + 10 * usual):
                    noticed += 1
                    continue
                where = f"{change.file.relative_to(ROOT)}:{change.line}"
                print(f"{where}: no test fails where\n    {change.before}\nis\n    {change.after}", flush=True)
            took = time.monotonic() - begun
            print(
                f"{name}: {noticed} of {len(sample)} changes are noticed (seed {options.seed}, {took:.0f} s)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
