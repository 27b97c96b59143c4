"""Pictures as data URIs, by matplotlib."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cure_plugin.certification.record import Record
from cure_plugin.errors import MissingDependencyError

_PANELS_PER_ROW = 4
_LARGEST = 1e30
"""Margins beyond it are drawn there."""

_COLOURS = {"proved": "#2a9d5c", "undecided": "#b0b0b0", "falsified": "#c8503c"}


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to memory.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("HTML reports need matplotlib: pip install 'cure-plugin[plot]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def picture(image: Tensor) -> str:
    """A small image (C, H, W) in [0, 1]."""
    buffer = io.BytesIO()
    pixels = image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    if pixels.shape[2] == 1:
        load_pyplot().imsave(buffer, pixels[:, :, 0], cmap="gray", vmin=0, vmax=1, format="png")
    else:
        load_pyplot().imsave(buffer, pixels, format="png")
    return _data_uri(buffer.getvalue())


def curve_plot(factors: Sequence[float], curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One panel per set and one for the union, a line per method."""
    figure, axes = _panels(list(next(iter(curves.values()))))
    for name, axis in axes.items():
        for method, by_set in curves.items():
            axis.plot(factors, [100 * share for share in by_set[name]], marker="o", markersize=3, label=method)
        axis.set_xlabel("multiple of the set's size")
        axis.set_ylabel("certified %")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    next(iter(axes.values())).legend()
    return _drawn(figure)


def margin_plot(records: Sequence[Record]) -> str:
    """One panel per set: how the margins of certification records spread, coloured by status.

    The outermost bars also hold the 1 % beyond each end.
    """
    figure, axes = _panels(list(records[0].sets))
    for name, axis in axes.items():
        margins: dict[str, list[float]] = {status: [] for status in _COLOURS}
        for verdict in (record.sets[name] for record in records):
            if math.isfinite(verdict.margin):
                margins[verdict.status].append(verdict.margin)
        together = np.concatenate([np.array(values) for values in margins.values()])
        together = together.clip(-_LARGEST, _LARGEST)
        low, high = np.percentile(together, [1, 99]) if together.size else (0.0, 1.0)
        wide = max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-6)  # else 30 bins would have no width
        axis.hist(
            [np.clip(values, low, high) for values in margins.values()],
            bins=np.linspace(low, low + wide, 31),
            stacked=True,
            color=list(_COLOURS.values()),
            label=list(margins),
        )
        axis.set_xlabel("margin")
        axis.set_ylabel("images")
        axis.yaxis.get_major_locator().set_params(integer=True)
    next(iter(axes.values())).legend()
    return _drawn(figure)


def _panels(titles: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """(a figure, title -> axes)."""
    columns = min(len(titles), _PANELS_PER_ROW)
    rows = -(-len(titles) // columns)
    figure, grid = load_pyplot().subplots(rows, columns, figsize=(3.2 * columns, 3 * rows), squeeze=False)
    for axis in grid.flat[len(titles) :]:
        axis.set_visible(False)
    axes = dict(zip(titles, grid.flat, strict=False))
    for title, axis in axes.items():
        axis.set_title(title)
    return figure, axes


def _drawn(figure: Any) -> str:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    load_pyplot().close(figure)
    return _data_uri(buffer.getvalue())


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
