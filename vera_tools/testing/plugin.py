"""A plugin of pytest: ``pytest --vera registry/`` collects each adapter in a folder as a test.

Adapters of other kinds are skipped. A test fails where ``vera-tools verify`` would not exit with 0, and says why. The
fixture `verify_vera` verifies a checkpoint from within a test. Nothing of vera-tools is imported before it is used:
every run of pytest loads this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vera_tools.checkpoints.base import BaseModel
    from vera_tools.verifying.report import CheckpointReport
    from vera_tools.verifying.verifier import Verifier

#: The files by which an adapter is known, the first that is there; see `vera_tools.checkpoints.presence`.
SIGNS = ("adapter_config.json", "vera_manifest.json", "adapter_model.safetensors")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--vera``, and what verifying is asked with it."""
    group = parser.getgroup("vera", "VeRA adapters (vera-tools)")
    group.addoption("--vera", action="store_true", help="Collect each adapter that is found as a test: verify it.")
    group.addoption("--vera-base", metavar="BASE", help="The base model that every adapter has to fit.")
    group.addoption(
        "--vera-require",
        metavar="VERDICT",
        default="reproducible",
        help="The worst verdict that passes (reproducible, assumed, unproven, drift, invalid).",
    )
    group.addoption(
        "--vera-require-loads", metavar="SPEC", action="append", default=[], help="Loaders that have to be exact."
    )
    group.addoption(
        "--vera-require-recorded", action="store_true", help="Fail what no manifest covers (see vera-tools record)."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what is not known before anything is collected."""
    if config.getoption("--vera"):
        from vera_tools.errors import VeraToolsError

        try:
            config.stash[_KEY] = _Verification(config)
        except VeraToolsError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the base."""
    if verification := config.stash.get(_KEY, None):
        verification.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> Generator[None, Any, None]:
    """Say where adapters lie in a folder that pytest passes over: by itself it enters none called build or dist."""
    outcome = yield
    if not (outcome.get_result() and config.getoption("--vera") and _may_hold_adapters(collection_path)):
        return
    from vera_tools.checkpoints.presence import find

    if (adapter := next(find(collection_path), None)) is not None:
        message = (
            f"{adapter} is not verified, nor what else lies below {collection_path}: pytest leaves that folder out"
        )
        warnings.warn(pytest.PytestCollectionWarning(f"{message} (norecursedirs, --ignore)"), stacklevel=1)


def _may_hold_adapters(path: Path) -> bool:
    """Hidden folders and installed packages are left out by `vera-tools verify -R` too, or are large and hold none."""
    return path.is_dir() and not path.name.startswith((".", "node_modules")) and not (path / "pyvenv.cfg").exists()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Each adapter, by its config; by another of its files where that is gone."""
    if file_path.name not in SIGNS or not parent.config.getoption("--vera"):
        return None
    from vera_tools.checkpoints.presence import is_adapter

    folder = file_path.parent
    there = [name for name in SIGNS if (folder / name).is_symlink() or (folder / name).is_file()]
    if there[:1] != [file_path.name] or not is_adapter(folder, there):
        return None
    adapter: pytest.Collector = Adapter.from_parent(parent, path=file_path)
    return adapter


@pytest.fixture
def verify_vera() -> Callable[..., CheckpointReport]:
    """Verify one checkpoint, with the arguments of `vera_tools.verify`, and get its report, whatever it says."""

    def verify(checkpoint: Any, **arguments: Any) -> CheckpointReport:
        import vera_tools

        (report,) = vera_tools.verify(checkpoint, **arguments).checkpoints
        return report

    return verify


class Adapter(pytest.File):
    """A file of an adapter, which stands for the folder that it lies in."""

    def collect(self) -> Iterator[pytest.Item]:
        """One test."""
        yield AdapterItem.from_parent(self, name="vera")


class AdapterItem(pytest.Item):
    """Verifies one adapter."""

    def runtest(self) -> None:
        """Verify it.

        Raises:
            AssertionError: it is not what it should be.
        """
        folder = self.path.parent
        here = Path.cwd()
        self.config.stash[_KEY].check(folder.relative_to(here) if folder.is_relative_to(here) else folder)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *arguments: Any) -> Any:
        """The reasons, without a traceback through the tool."""
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *arguments)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it lies."""
        return self.path, None, f"vera: {self.path.parent.name}"


class _Verification:
    """What all tests of a run share: the base, and the projections that were drawn already."""

    def __init__(self, config: pytest.Config) -> None:
        from vera_tools.checkpoints.base import BaseModel
        from vera_tools.errors import UsageError
        from vera_tools.verifying.findings import VERDICTS
        from vera_tools.verifying.gates import LoadSpec
        from vera_tools.verifying.verifier import Verifier

        self._require = config.getoption("--vera-require").lower()
        self._require_recorded: bool = config.getoption("--vera-require-recorded")
        if self._require not in VERDICTS:
            raise UsageError("--vera-require", expected=" or ".join(VERDICTS), found=config.getoption("--vera-require"))
        self._loads = tuple(map(LoadSpec.parse, config.getoption("--vera-require-loads")))
        base = config.getoption("--vera-base")
        self._base: BaseModel | None = BaseModel.open(base) if base is not None else None
        self._verifier: Verifier = Verifier(base=self._base, skip_others=True)

    def check(self, folder: Path) -> None:
        from vera_tools.errors import VeraToolsWarning
        from vera_tools.testing.assertions import reasons
        from vera_tools.verifying.report import Failed, Skipped, VerifyReport

        with warnings.catch_warnings():  # what the tool warns of is in its report
            warnings.simplefilter("ignore", VeraToolsWarning)
            outcome = self._verifier.verify(str(folder))
            if self._base:
                self._base.check_unchanged()
        if isinstance(outcome, Skipped):
            pytest.skip(f"not VeRA: {outcome.kind}")
        if isinstance(outcome, Failed):
            raise AssertionError(str(outcome.error))
        outcome = outcome.with_required() if self._require_recorded else outcome
        report = VerifyReport((outcome,), (), self._require, (), self._loads)
        if report.exit_code:
            raise AssertionError("\n".join(reasons(outcome, report)))

    def close(self) -> None:
        if self._base:
            self._base.close()


_KEY = pytest.StashKey[_Verification]()
