"""Bars on terminals, few lines in logs, nothing where nothing is asked for."""

from __future__ import annotations

import io

import pytest

from cure_plugin import progress
from cure_plugin.progress import progress_bar, shown_on


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, show: bool = True, seconds: float = 60.0) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    with progress_bar(2000, "image", "certify", show, 500) as bar:
        for number in range(1500):
            bar.set_postfix(loss=number, refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\r" in written(Terminal(), monkeypatch)


def test_a_log_has_a_line_now_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = written(io.StringIO(), monkeypatch).splitlines()
    assert len(lines) <= 3 and lines[0].startswith("certify: 500/2000 images") and "2000/2000" in lines[-1]
    assert not any("\r" in line or "|" in line for line in lines)


def test_batches_are_spelt_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(1, "batch", "train", True) as bar:
        bar.update()
    assert "1/1 batches," in stream.getvalue()


def test_lines_come_as_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(written(io.StringIO(), monkeypatch, seconds=0.0).splitlines()) > 100


def test_nothing_is_shown_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(io.StringIO(), monkeypatch, show=False) == "" == written(Terminal(), monkeypatch, show=False)


def test_pieces_are_not_shown_unasked() -> None:
    with progress_bar(2, "image", "certify", False) as bar:
        shown_on(bar)(40, -0.125)


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (60.0, 1)])
def test_pieces_and_their_worst_bound_are_shown(monkeypatch: pytest.MonkeyPatch, seconds: float, lines: int) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    with progress_bar(2, "image", "certify", True) as bar:
        watch = shown_on(bar)
        watch(40, -0.125)
        watch(99, -0.0625)
        bar.close()
    shown = [line for line in stream.getvalue().splitlines() if "pieces, worst bound" in line]
    assert len(shown) == lines and shown[-1].endswith("99 pieces, worst bound -0.0625")
