"""The commands of development by name: `nox --list` shows them, `nox -s tests -- tests/cli` runs one with arguments.

Each has an environment of its own, made from constraints.txt and kept. `nox --no-venv` takes the active one instead.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"


def install(session: nox.Session, *what: str) -> None:
    """Install packages in the versions of constraints.txt, unless the session runs in an environment that is there."""
    if session.venv_backend != "none":
        session.install("-q", "-c", "constraints.txt", *what)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, or those that are named."""
    install(session, "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules of style and the formatting."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    install(session, "-e", ".[dev]")
    session.run("mypy", *session.posargs)


@nox.session
def outputs(session: nox.Session) -> None:
    """Compare what every command prints and writes over fixtures/ with tests/transcripts; `-- --write` renews it."""
    install(session, "-e", ".[dev]")
    session.run("python", "-m", "tests.outputs", *session.posargs)


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation as a site in build/site, every warning an error."""
    install(session, "-e", ".[docs]")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "-n", "-c", "docs/site", ".", "build/site")


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark: `nox -s bench -- merge.py --help`."""
    if not session.posargs:
        session.error("name one: nox -s bench -- merge.py")
    install(session, "-e", ".[dev]")
    script, *arguments = session.posargs
    session.run("python", f"benchmarks/{script}", *arguments)
