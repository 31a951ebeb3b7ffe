"""``vera-tools``, and ``python -m vera_tools``."""

import sys


def main() -> None:
    """Run the command line. An interrupt ends it with 130, while it is still being imported too."""
    try:
        from vera_tools.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
