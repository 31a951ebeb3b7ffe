"""``vera-tools env``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vera_tools._version import __version__
from vera_tools.cli.shared import Output, examples, labelled, output_options
from vera_tools.platforms.names import PLATFORMS

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.platforms.environment import EnvReport


@click.command("env", epilog=examples("env", "env --json"))
@output_options
def command(output: Output) -> int:
    """Versions, CPU capability, which platform of the loader table this machine is, and what its torch draws.

    torch is not imported and nothing is drawn: this is what is known of such builds. `drift` draws.
    """
    from vera_tools.platforms.environment import describe

    report = describe()
    return output.emit(report, lambda console: _show(report, console))


def _show(report: EnvReport, console: Console) -> None:
    console.print(f"vera-tools {__version__}, Python {report.python}, {report.system} {report.machine}")
    found = [f"{name} {version}" for name, version in report.packages.items() if version]
    missing = [name for name, version in report.packages.items() if not version]
    labelled(console, "packages", ", ".join(found))
    if missing:
        labelled(console, "missing", ", ".join(missing))
    how = "" if report.capability.source == "cpu" else f" ({report.capability.source})"
    cpu = [*([report.cpu_model] if report.cpu_model else []), f"kernels {report.capability.name or 'unknown'}{how}"]
    labelled(console, "cpu", ", ".join(cpu))
    if report.platform is None:
        labelled(console, "platform", "none of the loader table: `vera-tools drift` says what torch draws here")
        return
    labelled(console, "platform", f"{report.platform} ({PLATFORMS[report.platform]})")
    if report.draws:
        labelled(console, "draws", f"{report.recipe}, as torch {report.draws.torch} does here ({report.evidence})")
    else:
        torch = report.packages["torch"]
        labelled(console, "draws", f"not known of torch {torch}: `vera-tools drift` says" if torch else "no torch here")
        for span in report.known:
            labelled(console, "", f"torch {span.torch}: {span.rounding} ({span.evidence})")
