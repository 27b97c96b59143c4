"""The command line: a thin user of the library."""

from cure_plugin.cli.main import main

__all__ = ["main"]
