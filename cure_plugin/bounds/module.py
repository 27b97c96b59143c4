"""A ``BoundedModule`` with the options that keep every auto_LiRPA version sound and working."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from torch import nn

from cure_plugin.modes import evaluation_mode

BOUND_OPTIONS: dict[str, Any] = {
    # 0.3 indexes alphas by a stale mask when over 90 % of a layer is unstable.
    "sparse_features_alpha": False,
    # 0.3 asserts that unstable neurons stay as many as when the alphas were made.
    "sparse_spec_alpha": False,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default for a while: auto_LiRPA builds some of its matrices in the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bounded_module(
    model: nn.Module, input_shape: tuple[int, ...], options: dict[str, Any] | None = None
) -> BoundedModule:
    """Wrap ``model`` (its parameters and buffers are shared) for inputs of shape (B, *input_shape).

    Args:
        options: auto_LiRPA's ``bound_opts`` on top of :data:`BOUND_OPTIONS`.
    """
    reference = next(model.parameters())
    chosen = {**BOUND_OPTIONS, **(options or {})}
    if any(isinstance(module, nn.Conv2d) and module.groups != 1 for module in model.modules()):
        chosen["conv_mode"] = "matrix"  # patches mode bounds grouped convolutions wrongly, in both versions
    example = torch.zeros(1, *input_shape, dtype=reference.dtype, device=reference.device)
    with evaluation_mode(model):  # tracing must neither change running statistics nor refuse a batch of one
        bounded = BoundedModule(model, example, bound_opts=chosen, device=reference.device)
    # auto_LiRPA shares parameters with the model but copies buffers: running statistics would go stale
    buffers = dict(model.named_buffers())
    for node in bounded.modules():
        if type(node).__name__ == "BoundBuffers" and node.ori_name in buffers:
            node.buffer = buffers[node.ori_name]
    return bounded
