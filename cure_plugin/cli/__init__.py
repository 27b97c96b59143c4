"""The command line: a thin user of the library."""

from cure_plugin.compat import import_auto_lirpa

import_auto_lirpa()  # says what to install where it is missing

from cure_plugin.cli.main import main

__all__ = ["main"]
