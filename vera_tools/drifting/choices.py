"""What `drift` can be told, apart from what does it: the command line names it in its help, and imports little."""

from __future__ import annotations

#: The kinds of devices that torch names.
DEVICES = ("cpu", "cuda", "mps", "xpu")
#: Seconds that a probe may take.
TIMEOUT = 300.0
