"""Our certifier on files: a box-input property of a sequential ONNX net.

Also a command, see :mod:`cure_plugin.export.command`.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cure_plugin.certification import Certifier, Verdict
from cure_plugin.errors import DataError
from cure_plugin.export.command import run_command
from cure_plugin.export.onnx_reader import read_onnx_net
from cure_plugin.sets import PerturbationLpBall
from cure_plugin.vnncomp.query import Case, Query

METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN")
"""Those that take any box."""

_RESTARTS = 10
"""Of the attack: boxes of few parameters hold many local optima."""


_RUNTIME_SHARE = 1e-5
"""Of the largest logit (at least 1): a smaller margin is no answer, as files are judged by what a float32 runtime makes
of them, which the real-number function of their weights does not say."""


@dataclass(frozen=True)
class Decision:
    """What the certifier says of a property.

    Attributes:
        verdict: ``robust``, ``violated`` or ``unknown``.
        stage: what decided; of several boxes, what the hardest one needed.
        margin: smallest lower bound of a margin over all boxes; for ``violated`` the counterexample's margin.
        counterexample: flattened input (d,) where ``violated``, in float32 numbers.
    """

    verdict: str
    stage: str
    margin: float
    counterexample: np.ndarray | None = None


def decide_query(net: nn.Module, input_shape: tuple[int, ...], query: Query) -> Decision:
    """Bound every box of ``query`` in float64, attacking it as well.

    Args:
        net: classifier, (B, *input_shape) to (B, C).

    Raises:
        DataError: the query asks for something else than whether one class wins in every one of some boxes, or has
            another number of outputs.
    """
    cases = query.cases()
    hardest = Decision("robust", METHODS[0], math.inf)
    if not cases:
        return hardest
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        outputs = net(torch.zeros(1, *input_shape, dtype=torch.float64)).numel()
    if outputs != query.outputs:
        raise DataError(f"the net has {outputs} outputs, {query.source} has {query.outputs}")
    label = _label(query, cases[0])
    if any(_label(query, case) != label for case in cases[1:]):
        raise DataError(f"{query.source} asks for different classes in different boxes")
    certifier = Certifier(net, input_shape, METHODS, restarts=_RESTARTS)
    for start in range(0, len(cases), certifier.batch_size):
        some = cases[start : start + certifier.batch_size]
        lower, upper = (
            torch.from_numpy(np.stack([getattr(case, end) for case in some])).view(-1, *input_shape)
            for end in ("lower", "upper")
        )
        middle = torch.minimum(torch.maximum((lower + upper) / 2, lower), upper)
        reach = torch.maximum(middle - lower, upper - middle).flatten(1).amax(1) * (1 + 1e-9)
        boxes = _Boxes(math.inf, reach, (lower, upper))
        labels = torch.full((len(some),), label)
        verdicts, points = certifier.decide(middle, labels, boxes, torch.Generator().manual_seed(start))
        with torch.no_grad():
            needed = _RUNTIME_SHARE * certifier.net(middle).abs().amax(1).clamp(min=1)
        for verdict, point, least in zip(verdicts, points, needed.tolist(), strict=True):
            if verdict.status == "falsified":
                return Decision("violated", verdict.stage, verdict.margin, point.flatten().float().double().numpy())
            hardest = _harder(hardest, verdict if verdict.margin > least else replace(verdict, status="undecided"))
    return hardest


class _Boxes(PerturbationLpBall):
    """A box per sample: a ball that reaches all of it, cut with it; attacks move by shares of each side."""

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        lower, upper = self._ends()
        return torch.clamp(variable + step * (upper - lower) / 2 * gradient.sign(), lower, upper)

    def select(self, x: Tensor, index: Tensor) -> _Boxes:
        lower, upper = self._ends()
        return _Boxes(self.p, torch.as_tensor(self.eps)[index], (lower[index], upper[index]))

    def _ends(self) -> tuple[Tensor, Tensor]:
        lower, upper = self.domain or (0.0, 0.0)
        return torch.as_tensor(lower), torch.as_tensor(upper)


def _harder(so_far: Decision, verdict: Verdict) -> Decision:
    """The decision over all boxes, one more of them known."""
    if verdict.status != "proved" or so_far.verdict == "unknown":
        return Decision("unknown", METHODS[-1], min(so_far.margin, verdict.margin))
    stage = max(so_far.stage, verdict.stage, key=METHODS.index)
    return Decision("robust", stage, min(so_far.margin, verdict.margin))


def _label(query: Query, case: Case) -> int:
    """The class that has to beat every other."""
    labels, rivals = set(), set()
    for alternative in case.alternatives:
        factors = [sorted(linear.coefficients.values()) for linear in alternative if linear.bound == 0]
        if len(alternative) != 1 or factors != [[-1, 1]]:
            raise DataError(f"{query.source} is no robustness property: it asks more than whether one class wins")
        numbers = {factor: number for number, factor in alternative[0].coefficients.items()}
        labels.add(numbers[1.0])
        rivals.add(numbers[-1.0])
    if len(labels) != 1 or rivals != set(range(query.outputs)) - labels:
        raise DataError(f"{query.source} is no robustness property: one class has to win against all others")
    return labels.pop()


def solve(onnx_path: str | Path, query: Query) -> Decision:
    """:func:`decide_query` for a file as :func:`export_onnx` writes it.

    Raises:
        CheckpointError: it is no such file. DataError: as there, or sizes that do not fit each other.
    """
    net, shape = read_onnx_net(onnx_path)
    if math.prod(shape) != query.inputs:
        raise DataError(f"{onnx_path} takes {math.prod(shape)} inputs, {query.source} has {query.inputs}")
    return decide_query(net, shape, query)


def _solver(onnx: str, query: Query, _: float) -> tuple[str, np.ndarray | None]:
    """Stopped from outside when its time is up."""
    found = solve(onnx, query)
    return {"robust": "unsat", "violated": "sat"}.get(found.verdict, "unknown"), found.counterexample


if __name__ == "__main__":
    sys.exit(run_command(_solver, sys.argv[1:]))
