"""Our certifier on files: a property of an ONNX net with boxes of inputs.

Whether one class wins is asked of the certifier; what else there is, of :mod:`cure_plugin.export.search`.

Also a command, see :mod:`cure_plugin.export.command`.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cure_plugin.certification import (
    AlphaCrown,
    Attack,
    BranchAndBound,
    Certifier,
    Crown,
    CrownIbpBound,
    IbpBound,
    Method,
    Verdict,
)
from cure_plugin.errors import DataError
from cure_plugin.export.command import run_command
from cure_plugin.export.onnx_reader import read_asked
from cure_plugin.export.search import RUNTIME_SHARE, Search
from cure_plugin.sets import PerturbationBox
from cure_plugin.vnncomp.query import Case, Query
from cure_plugin.vnncomp.replay import INPUT_TOLERANCE, Answer, Network, fault_of

_LEAST_SECONDS = 0.1
"""Of branch and bound on a box."""

_FEW = 20
"""Inputs, up to which boxes are split where the certifier leaves open whether a class wins."""


def _methods(seconds: float) -> tuple[Method, ...]:
    """Those that take any box; many restarts, as boxes of few parameters hold many local optima."""
    split = BranchAndBound(seconds=max(seconds, _LEAST_SECONDS))
    return IbpBound(), Attack(restarts=10), CrownIbpBound(), Crown(), split, AlphaCrown()


_STAGES = tuple(method.name for method in _methods(1.0) if method.proves)
"""What proves, the cheapest first."""


@dataclass(frozen=True)
class Decision:
    """What the certifier says of a property.

    Attributes:
        verdict: ``robust`` (no allowed input satisfies the query), ``violated``, ``unknown`` or ``timeout``.
        stage: what decided; of several boxes, what the hardest one needed. ``search`` where boxes were split.
        margin: smallest lower bound of a margin over all boxes; for ``violated`` the counterexample's margin.
        counterexample: flattened input (d,) where ``violated``, in float32 numbers.
    """

    verdict: str
    stage: str
    margin: float
    counterexample: np.ndarray | None = None


def decide_query(
    net: nn.Module,
    input_shape: tuple[int, ...],
    query: Query,
    timeout: float = 60,
    confirm: Callable[[np.ndarray], bool] | None = None,
) -> Decision:
    """Bound every box of ``query`` in float64, attacking it as well.

    Args:
        net: (B, *input_shape) to (B, outputs).
        timeout: seconds for branch and bound, shared by the boxes, and for the splitting of boxes; other bounds take
            what they take.
        confirm: whether a flattened input (d,) is a counterexample; default: whether the net in float64 says so.

    Raises:
        DataError: inputs that are bound by more than boxes, or another number of outputs.
        SpecError: a net that cannot be bounded.
    """
    started = time.monotonic()
    cases = query.cases()
    if not cases:
        return Decision("robust", _STAGES[0], math.inf)
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        outputs = net(torch.zeros(1, *input_shape, dtype=torch.float64)).numel()
    if outputs != query.outputs:
        raise DataError(f"the net has {outputs} outputs, {query.source} has {query.outputs}")
    labels = {_label(query, case) for case in cases}
    label = labels.pop()
    if label is not None and not labels:
        decided = _decide_class(net, input_shape, cases, label, timeout)
        if decided.verdict != "unknown" or query.inputs > _FEW:
            return decided

    def satisfies(point: np.ndarray) -> bool:
        with torch.no_grad():
            found = net(torch.from_numpy(point).view(1, *input_shape)).numpy().ravel()
        return query.satisfied(point, found, INPUT_TOLERANCE)

    search = Search(net, input_shape, outputs, cases, confirm or satisfies)
    found = search.decide(started + timeout)
    return Decision(found.verdict, "search", found.margin, found.point)


def _decide_class(
    net: nn.Module, input_shape: tuple[int, ...], cases: Sequence[Case], label: int, timeout: float
) -> Decision:
    """Whether class ``label`` wins all over the boxes, by the certifier."""
    hardest = Decision("robust", _STAGES[0], math.inf)
    certifier = Certifier(net, input_shape, _methods(timeout / len(cases)))
    for start in range(0, len(cases), certifier.batch_size):
        some = cases[start : start + certifier.batch_size]
        lower, upper = (
            torch.from_numpy(np.stack([getattr(case, end) for case in some])).view(-1, *input_shape)
            for end in ("lower", "upper")
        )
        middle = torch.minimum(torch.maximum((lower + upper) / 2, lower), upper)
        boxes = PerturbationBox(lower, upper)
        labels = torch.full((len(some),), label)
        verdicts, points = certifier.decide(middle, labels, boxes, torch.Generator().manual_seed(start))
        with torch.no_grad():
            needed = RUNTIME_SHARE * certifier.net(middle).abs().amax(1).clamp(min=1)
        for verdict, point, least in zip(verdicts, points, needed.tolist(), strict=True):
            if verdict.status == "falsified":
                return Decision("violated", verdict.stage, verdict.margin, point.flatten().float().double().numpy())
            hardest = _harder(hardest, verdict if verdict.margin > least else replace(verdict, status="undecided"))
    return hardest


def _harder(so_far: Decision, verdict: Verdict) -> Decision:
    """The decision over all boxes, one more of them known."""
    if verdict.status != "proved" or so_far.verdict == "unknown":
        return Decision("unknown", _STAGES[-1], min(so_far.margin, verdict.margin))
    stage = max(so_far.stage, verdict.stage, key=_STAGES.index)
    return Decision("robust", stage, min(so_far.margin, verdict.margin))


def _label(query: Query, case: Case) -> int | None:
    """The class that has to beat every other; None where something else is asked."""
    labels, rivals = set(), set()
    for alternative in case.alternatives:
        factors = [sorted(linear.coefficients.values()) for linear in alternative if linear.bound == 0]
        if len(alternative) != 1 or factors != [[-1, 1]]:
            return None
        numbers = {factor: number for number, factor in alternative[0].coefficients.items()}
        labels.add(numbers[1.0])
        rivals.add(numbers[-1.0])
    return labels.pop() if len(labels) == 1 and rivals == set(range(query.outputs)) - labels else None


def solve(onnx_path: str | Path, query: Query, timeout: float = 60) -> Decision:
    """:func:`decide_query` for an ONNX file; counterexamples are those that onnxruntime confirms.

    Raises:
        CheckpointError: it cannot be read. DataError: as there, or sizes that do not fit each other.
    """
    found, network = read_asked(onnx_path, query), Network(onnx_path)

    def confirm(point: np.ndarray) -> bool:
        return fault_of(network, query, Answer("sat", point)) is None

    return decide_query(found.net, found.shape, query, timeout, confirm)


def _solver(onnx: str, query: Query, timeout: float) -> tuple[str, np.ndarray | None]:
    """Of questions of classes, stopped from outside when its time is up."""
    found = solve(onnx, query, timeout)
    return {"robust": "unsat", "violated": "sat"}.get(found.verdict, found.verdict), found.counterexample


if __name__ == "__main__":
    sys.exit(run_command(_solver, sys.argv[1:]))
