"""``vera-tools``, and ``python -m vera_tools``."""

import gc
import sys

#: Objects that are made between two searches for garbage. A hundred thousand tensors are a million objects that all
#: live until the end, and with Python's own 700 the searches take a third of the time.
_BETWEEN_SEARCHES = 100_000


def main() -> None:
    """Run the command line. An interrupt ends it with 130, while it is still being imported too."""
    try:
        from vera_tools.cli import main as run

        gc.set_threshold(_BETWEEN_SEARCHES)
        gc.freeze()  # what was imported stays
        try:
            run()
        finally:
            gc.freeze()  # Python would search all there is for garbage once more, only to end: 40 ms
    except KeyboardInterrupt:
        _end()
    except Exception as error:
        from vera_tools.errors import was_interrupt

        if not was_interrupt(error):
            raise
        _end()


def _end() -> None:
    sys.stderr.write("interrupted\n")
    sys.exit(130)


if __name__ == "__main__":
    main()
