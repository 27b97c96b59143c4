"""The errors this package raises on purpose, and its warnings: one line each, naming argument, value and remedy."""

from __future__ import annotations


class CureError(Exception):
    """Base of every error raised on purpose; the command line prints it on one line and exits with 2."""


class SpecError(CureError, ValueError):
    """A perturbation set, spec or setting that makes no sense (eps < 0, unknown norm, NaN pixels ...)."""


class DataError(CureError, OSError):
    """A data folder or data file that is missing, truncated or malformed."""


class CheckpointError(CureError, OSError):
    """A checkpoint or model file that cannot be read, or does not fit the net it is meant for."""


class OutputError(CureError, OSError):
    """An output that cannot be written (folder missing, not writable, disk full)."""


class MissingDependencyError(CureError, ImportError):
    """An optional or separately installed package is absent; the message says how to install it."""


class MemoryWarning(UserWarning):
    """A bound computation that may take more memory than was asked for, even for a single image."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says, in one line: its kind where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__
