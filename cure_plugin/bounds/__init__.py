"""Bounds on top of auto_LiRPA: exact first layers, margins, and the options each version needs."""

from cure_plugin.compat import import_auto_lirpa

import_auto_lirpa()  # says what to install where it is missing
