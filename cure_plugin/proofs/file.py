"""Proof files: read lazily, checked image by image, and compared with the net that they are said to be of."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cure_plugin.errors import DataError
from cure_plugin.proofs.checker import FaultyProofError, ImageProof, Net
from cure_plugin.vnncomp.replay import Network

_POINTS = 100
"""Where a file's net is compared with an ONNX file, for each image's set."""

_TOLERANCE = 1e-4
"""Relative, of what float32 and float64 may differ by."""


@dataclass(frozen=True)
class Checked:
    """What the checker says of one proof.

    Attributes:
        name: of the proof in its file. label, p, eps: what it is about; p = inf also of boxes, whose eps is 0.
        leaves: how many. bound: the smallest of one. fault: why it is no proof; empty where it is one.
    """

    name: str
    label: int = -1
    p: float = np.inf
    eps: float = 0.0
    leaves: int = 0
    bound: float = -np.inf
    fault: str = ""


class _Part:
    """The arrays below one name of a file."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, key: str) -> np.ndarray[Any, np.dtype[Any]]:
        return np.asarray(self.file[f"{self.name}/{key}"])


def check_proofs(path: str | Path, onnx: str | Path | None = None) -> Iterator[Checked]:
    """Check every proof of a file, one after the other.

    Args:
        onnx: the net that the proofs are said to be of: onnxruntime's outputs at random points of every set must be
            those of the file's matrices, which finds mix-ups but proves nothing.

    Raises:
        DataError: no proof file, or one without proofs. CheckpointError: ``onnx`` cannot be loaded.
    """
    network = None if onnx is None else Network(onnx)
    try:
        with np.load(path, allow_pickle=False) as file:
            net = _read_net(_Part(file, "net"))
            names = list(dict.fromkeys(name.split("/")[1] for name in file.files if name.startswith("image/")))
            for name in names:
                yield _check(net, name, _Part(file, f"image/{name}"), network)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no proof file: {error}; write one by cure certify --proof") from error
    if not names:
        raise DataError(f"{path} holds no proof")


def _read_net(part: _Part) -> Net:
    net: Net = []
    for k in range(1, int(part["layers"]) + 1):
        weights = {int(j): part[f"{k}/{j}"].astype(float) for j in part[f"{k}/sources"]}
        net.append((weights, part[f"{k}/bias"].astype(float)))
        finite = all(np.isfinite(one).all() for one in (*weights.values(), net[-1][1]))
        if not finite or not weights or not all(0 <= j < k for j in weights):
            raise ValueError(f"layer {k} of the net is none")
    return net


def _check(net: Net, name: str, part: _Part, network: Network | None) -> Checked:
    asked: dict[str, Any] = {}
    try:
        proof = ImageProof(net, part)
        asked = {"label": proof.label, "p": proof.p, "eps": proof.eps}
        leaves, bound = proof.check()
        if network is not None:
            _compare(proof, network)
    except (FaultyProofError, KeyError, IndexError, ValueError, RecursionError) as error:
        return Checked(name, **asked, fault=str(error) or type(error).__name__)
    return Checked(name, **asked, leaves=leaves, bound=bound)


def _compare(proof: ImageProof, network: Network) -> None:
    """Raises FaultyProofError where ``network`` is another function."""
    generator = np.random.default_rng(0)
    for _ in range(_POINTS):
        point = (proof.x + proof.low + generator.random(len(proof.x)) * (proof.high - proof.low)).astype(np.float32)
        theirs, ours = network(point), proof.values(point.astype(float))[-1]
        if theirs.shape != ours.shape or np.abs(theirs - ours).max() > _TOLERANCE * max(1.0, np.abs(ours).max()):
            raise FaultyProofError("the ONNX file is of another net")
