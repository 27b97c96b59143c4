"""One self-contained HTML page: table, certified-accuracy curves, example images."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cure_plugin.certification.summary import Summary
from cure_plugin.errors import MissingDependencyError
from cure_plugin.files import write_text
from cure_plugin.report.table import rows_of

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0}th,td{border:1px solid #ccc;padding:.35rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}th{background:#f3f3f3}
figure{display:inline-block;margin:.5rem;text-align:center;vertical-align:top;width:13rem}
figure img{width:6rem;image-rendering:pixelated;border:1px solid #ccc}figcaption{font-size:.8rem}
.curve{max-width:100%}code{background:#f3f3f3;padding:0 .2rem}
"""


@dataclass(frozen=True)
class Example:
    """One image to show.

    Attributes:
        image: (C, H, W) in [0, 1]. attacked: the counterexample, or None.
        caption: plain text below it.
    """

    image: Tensor
    attacked: Tensor | None
    caption: str


def write_report(
    path: str | Path,
    title: str,
    summaries: Mapping[str, Summary],
    factors: Sequence[float],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    examples: Mapping[str, Sequence[Example]],
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        summaries: method -> shares.
        factors, curves: method -> set -> certified share at each multiple of the radii.
        examples: heading -> images.
        notes: paragraphs of plain text, e.g. what outside tools said.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    header, rows = rows_of(summaries)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    images = next(iter(summaries.values())).images
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Percent of {images} test images: certified by bounds / not broken by PGD (an upper limit).</p>",
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        "<h2>Certified accuracy as the sets grow</h2>",
        f'<img class="curve" alt="Certified accuracy over the radii" src="{_curve_plot(factors, curves)}">',
    ]
    for heading, shown in examples.items():
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts.append("".join(_figure(example) for example in shown) or "<p>None.</p>")
    if notes:
        parts.append("<h2>Outside checks</h2>" + "".join(f"<p>{html.escape(note)}</p>" for note in notes))
    page = "\n".join(parts)
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>\n{page}\n</html>\n",
    )


def _figure(example: Example) -> str:
    pictures = [example.image] if example.attacked is None else [example.image, example.attacked]
    tags = "".join(f'<img alt="{html.escape(example.caption)}" src="{_picture(p)}">' for p in pictures)
    return f"<figure>{tags}<figcaption>{html.escape(example.caption)}</figcaption></figure>"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("reports need matplotlib: pip install 'cure-plugin[plot]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _picture(image: Tensor) -> str:
    """A small image as a data URI."""
    pyplot = _pyplot()
    buffer = io.BytesIO()
    pixels = image.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    if pixels.shape[2] == 1:
        pyplot.imsave(buffer, pixels[:, :, 0], cmap="gray", vmin=0, vmax=1, format="png")
    else:
        pyplot.imsave(buffer, pixels, format="png")
    return _data_uri(buffer.getvalue())


def _curve_plot(factors: Sequence[float], curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One panel per set and one for the union, a line per method."""
    pyplot = _pyplot()
    names = list(next(iter(curves.values())))
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for method, by_set in curves.items():
            axis.plot(factors, [100 * share for share in by_set[name]], marker="o", markersize=3, label=method)
        axis.set_title(name)
        axis.set_xlabel("multiple of the radius")
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("certified %")
    axes[0][0].legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return _data_uri(buffer.getvalue())
