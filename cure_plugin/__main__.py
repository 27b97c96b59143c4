"""``python -m cure_plugin`` is the console script ``cure``."""

import sys

from cure_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
