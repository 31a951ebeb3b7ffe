"""The version, in the one place that everything else reads it from."""

__version__ = "0.1.0"

#: What every document says of the program that wrote it.
TOOL = {"name": "vera-tools", "version": __version__}
