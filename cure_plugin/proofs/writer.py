"""Proofs as files for :mod:`cure_plugin.proofs.checker`: the net's matrices, and what each image's proof rests on."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cure_plugin.certification.branch_and_bound import BranchAndBound
from cure_plugin.certification.certifier import Certifier
from cure_plugin.errors import SpecError
from cure_plugin.files import write_atomically
from cure_plugin.progress import progress_bar
from cure_plugin.relaxation.affine import AffineNet
from cure_plugin.relaxation.dual import Duals
from cure_plugin.relaxation.trace import Trace
from cure_plugin.sets import PerturbationSet

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Iterator[tuple[str, Array]]


@dataclass(frozen=True)
class Question:
    """Whether one image is classified as ``y`` all over a set.

    Attributes:
        name: in the file. x: image (1, *input). y: label (1,). perturbation: lp ball or box.
    """

    name: str
    x: Tensor
    y: Tensor
    perturbation: PerturbationSet


def write_proofs(
    path: str | Path,
    certifier: Certifier,
    questions: Sequence[Question],
    method: BranchAndBound | None = None,
    progress: bool = False,
) -> list[bool]:
    """Search for proofs by branch and bound, and write those found.

    Args:
        path: ``.npz`` file to write; numbers as numpy keeps them, nothing that is executed when read.
        questions: what to prove, of names that differ.
        method: limits of each search; default: of :class:`BranchAndBound`.
        progress: show a bar on standard error, or lines where that is no terminal.

    Returns:
        Of each question whether its proof is in the file.

    Raises:
        SpecError: a net that is not made of linear layers and ReLUs, a set that is neither lp ball nor box, or a name
            that comes twice.
        OutputError: the file cannot be written.
    """
    method = method or BranchAndBound()
    names = [one.name for one in questions]
    if len(set(names)) < len(names) or any("/" in name for name in names):
        raise SpecError(f"each question needs a name of its own, without slashes; got {names!r}")
    for one in questions:
        if not method.applies_to(one.perturbation):
            raise SpecError(f"proofs can be written of lp balls and boxes, not of {one.perturbation!r}; leave it out")
    found: list[bool] = []

    def write(file: BinaryIO) -> None:
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            progress_bar(len(questions), "proof", "proofs", progress) as bar,
        ):
            for number, one in enumerate(questions):
                work = certifier.work(one.x, one.y, one.perturbation)
                affine = work.bounder.affine()
                if affine is None:
                    raise SpecError(
                        "proofs can be written of nets of linear layers and ReLUs only; leave the proof out"
                    )
                if not number:
                    _put(archive, _net(affine))
                trace = Trace()
                found.append(method.search(work, trace)[0].proved)
                if found[-1]:
                    arrays = _image(trace, work.y, one.perturbation)
                    _put(archive, ((f"image/{one.name}/{key}", value) for key, value in arrays))
                bar.update(1)

    write_atomically(path, write)
    return found


def _put(archive: zipfile.ZipFile, arrays: Arrays) -> None:
    for name, value in arrays:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, value, allow_pickle=False)


def _net(affine: AffineNet) -> Arrays:
    yield "net/layers", np.array(len(affine.biases))
    for k, (weights, bias) in enumerate(zip(affine.weights, affine.biases, strict=True), 1):
        yield f"net/{k}/bias", bias.numpy()
        yield f"net/{k}/sources", np.array(list(weights))
        for j, weight in weights.items():
            yield f"net/{k}/{j}", weight.numpy()


def _image(trace: Trace, y: Tensor, perturbation: PerturbationSet) -> Arrays:
    net, label = trace.net, int(y)
    assert net is not None  # something was proved
    start = net.start
    yield from {"x": start.x.numpy(), "low": start.low.numpy(), "high": start.high.numpy()}.items()
    yield "p", np.array(start.p)
    yield "eps", np.array(start.eps if math.isfinite(start.p) else 0.0)
    yield "label", np.array(label)
    yield "coupled", np.array(perturbation.shared_budget)
    counts: dict[int, int] = {}
    for k in range(1, len(net.layers) + 1):
        lower, upper = net.boxes(k)
        yield f"lower/{k}", lower.numpy()
        yield f"upper/{k}", upper.numpy()
    for k, index, found in trace.boxes:
        number = counts[k] = counts.get(k, -1) + 1
        yield f"box/{k}/{number}/index", index.numpy()
        yield from _duals(f"box/{k}/{number}", found)
    for k in range(1, len(net.layers) + 1):
        yield f"boxes/{k}", np.array(counts.get(k, -1) + 1)
    classes, signs, duals = (list(part) for part in zip(*trace.leaves, strict=True))
    others = torch.tensor([j for j in range(len(net.net.biases[-1])) if j != label])
    yield "leaf/class", others[torch.cat(classes)].numpy()
    yield "leaf/signs", torch.cat(signs).numpy()
    yield from _duals("leaf", Duals.join(duals))


def _duals(name: str, duals: Duals) -> Arrays:
    for part in Duals.__dataclass_fields__:
        yield f"{name}/{part}", getattr(duals, part).numpy()
