"""``python -m vera_tools``."""

from vera_tools.cli import main

main()
