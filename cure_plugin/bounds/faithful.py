"""Whether a traced graph is the net itself: for every input, batch and call.

auto_LiRPA traces a net at one input. What Python decided on the way, by reading values, is not in the graph; so nets
are first run on tensors that have no values (torch's fake tensors), which only those survive that read none. What else
can tell calls apart (the size of the batch, a counter, chance, the other images) shows where outputs are compared.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from auto_LiRPA import BoundedModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cure_plugin.errors import SpecError, first_line
from cure_plugin.modes import evaluation_mode

_SAME = 1e-3
"""How far apart, relative to the largest, outputs of the same net may be by rounding."""

_RANDOM = 10
"""Random inputs compared, half of them in the domain [0, 1] and half normally distributed."""


def check_reads_no_values(model: nn.Module, example: Tensor) -> None:
    """Refuse a net whose ``forward`` reads what is in a tensor: its graph would be that of one input.

    Args:
        example: (1, *input_shape), an input that the net takes.

    Raises:
        SpecError: ``bool``, ``item``, ``numpy``, indexing by conditions and their like, of inputs, of what is made of
            them, or of weights (which training changes).
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with evaluation_mode(model), torch.no_grad(), uncompiled(), fake:
            model(fake.from_tensor(example))
    except Exception as error:  # what torch raises there has no common class
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise SpecError(
            f"the net's forward reads values of tensors ({reason}), so that its graph would hold for one input alone; "
            "decide by tensor operations (relu, clamp, torch.where), and keep numbers such as a mean as tensors"
        ) from error


def check_same(bounded: BoundedModule, model: nn.Module, example: Tensor) -> None:
    """Refuse a graph that computes something else than the net: bounds of it would not be the net's.

    Raises:
        SpecError: outputs differ at one of many inputs, alone or in a batch, at the first or a later call; or the net
            takes no batches.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (_RANDOM // 2, *example.shape[1:])
    constants = torch.tensor([0.0, 1.0, 0.5, -1.0]).view(-1, *[1] * (example.ndim - 1)).expand(-1, *example.shape[1:])
    drawn = torch.rand(shape, generator=generator), 3 * torch.randn(shape, generator=generator)
    points = torch.cat([constants, *drawn]).to(example)
    with evaluation_mode(model), torch.no_grad():
        for some in (points, example, points[:1], points[-2:], points):
            try:
                expected = model(some)
            except Exception as error:  # whatever a net of somebody else raises
                reason = first_line(error)
                raise SpecError(f"the net fails on a batch {tuple(some.shape)}: {reason}") from error
            check_outputs(bounded, some, expected)


def check_outputs(bounded: BoundedModule, x: Tensor, expected: Tensor) -> None:
    """Refuse a graph that does not make ``expected`` (B, C) of ``x``, rounding aside.

    Raises:
        SpecError: it makes something else.
    """
    with evaluation_mode(bounded), torch.no_grad():
        given = bounded(x)
    apart = math.inf
    if given.shape == expected.shape:
        apart = float((given - expected).abs().where(expected.isfinite(), 0.0).amax())
    largest = float(expected.abs().nan_to_num(posinf=0.0).amax())
    if not apart <= _SAME * (1 + largest):
        raise SpecError(
            f"auto_LiRPA reads another net than the one given: outputs for {len(x)} images differ by {apart:.3g}; "
            "replace the layer that it does not know (as a pooling with divisor_override), and whatever makes the net "
            "do otherwise in another batch or at another call"
        )


def uncompiled() -> AbstractContextManager[object]:
    """While it lasts, compiled parts of nets run as they were written."""
    stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    if "torch._dynamo" not in sys.modules or stance is None:  # nothing is compiled
        return nullcontext()
    return cast(AbstractContextManager[object], stance("force_eager"))
