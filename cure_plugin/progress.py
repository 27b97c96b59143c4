"""How far long work is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

_SECONDS = 60.0
"""Between two lines of a log."""

Watch = Callable[[int, float], None]
"""Told, while one image is worked on, how many pieces of its set were bounded so far, and the worst bound."""


def unwatched(pieces: int, worst: float) -> None:
    """A :data:`Watch` that looks away."""


def shown_on(bar: tqdm) -> Watch:
    """A :data:`Watch` that writes behind the ``bar``, no more often than that is drawn anyway."""
    if bar.disable:
        return unwatched
    last = time.monotonic()

    def watch(pieces: int, worst: float) -> None:
        nonlocal last
        now = time.monotonic()
        due = now - last >= bar.mininterval
        last = now if due else last
        bar.set_postfix_str(f"{pieces} pieces, worst bound {worst:.3g}", refresh=due)

    return watch


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
