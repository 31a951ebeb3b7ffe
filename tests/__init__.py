"""The tests, in folders that mirror the packages of vera_tools; beside them, what several of them use."""

import platform
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
X86 = platform.machine() in ("x86_64", "AMD64")
