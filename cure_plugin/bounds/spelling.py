"""Layers spelled as auto_LiRPA reads them, while it does: convolutions whose padding has a name, compiled parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@contextmanager
def spelled_out(model: nn.Module) -> Iterator[None]:
    """Let convolutions with ``padding="same"`` or ``"valid"`` say in numbers what they pad; parameters stay theirs.

    Parts in ``torch.compile`` run as they were written.
    """
    kept: list[tuple[Any, str, Any]] = []
    part: Any
    for part in model.modules():
        if type(part).__name__ == "OptimizedModule":
            kept.append((part, "forward", part.forward))
            part.forward = part._orig_mod.forward
        if getattr(part, "_compiled_call_impl", None) is not None:  # part.compile() was called
            kept.append((part, "_compiled_call_impl", part._compiled_call_impl))
            part._compiled_call_impl = None
    named = [
        part
        for part in model.modules()
        if type(part) in _CONVOLUTIONS and isinstance(part.padding, str) and "forward" not in vars(part)
    ]
    for part in named:
        part.forward = functools.partial(_convolved, part)
    try:
        yield
    finally:
        for part in named:
            del part.forward
        for part, name, value in kept:
            setattr(part, name, value)


def _convolved(layer: Any, x: Tensor) -> Tensor:
    """``layer.forward(x)``, with a padding in front where its two sides differ or it is none of zeros."""
    convolution, amounts = _CONVOLUTIONS[type(layer)], layer._reversed_padding_repeated_twice
    before, after = amounts[::2], amounts[1::2]
    padding = tuple(reversed(before))
    if before != after or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, amounts, mode=mode), (0,) * len(padding)
    return convolution(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
