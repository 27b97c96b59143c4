"""How far long work is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

_SECONDS = 60.0
"""Between two lines of a log."""


class _Lines:
    """Takes what tqdm draws over and over, and writes it as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, unit: str, label: str, show: bool, done: int = 0) -> tqdm:
    """tqdm's bar on standard error where that is a terminal; where it is none, lines, at most one a minute.

    Args:
        total: how many ``unit`` there are, ``done`` of them before. label: in front. show: whether to show anything.
    """
    stream, plural = sys.stderr, f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    if not show or stream.isatty():
        return tqdm(total=total, initial=done, unit=unit, desc=label, disable=not show)
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=label,
        file=_Lines(stream),
        mininterval=_SECONDS,
        maxinterval=_SECONDS,
        bar_format=f"{{desc}}: {{n_fmt}}/{{total_fmt}} {plural}, {{elapsed}} so far, {{remaining}} left{{postfix}}",
    )
