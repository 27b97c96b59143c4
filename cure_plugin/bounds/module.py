"""A ``BoundedModule`` with the options that keep every auto_LiRPA version sound and working."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from auto_LiRPA import __version__ as version
from torch import Tensor, nn

from cure_plugin.bounds.average_pool import mend_average_pools
from cure_plugin.errors import SpecError
from cure_plugin.modes import evaluation_mode, frozen

BOUND_OPTIONS: dict[str, Any] = {
    # 0.3 indexes alphas by a stale mask when over 90 % of a layer is unstable.
    "sparse_features_alpha": False,
    # 0.3 asserts that unstable neurons stay as many as when the alphas were made.
    "sparse_spec_alpha": False,
}

_SAME = 1e-3
"""How far apart, relative to the largest, outputs of the same net may be by rounding."""

_NO_PATCHES = ("BoundSub", "BoundMul", "BoundDiv", "BoundAveragePool")
"""As of a normalisation ``(x - mean) / std`` that is no :class:`cure_plugin.nets.Normalize`."""


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
        input_shape: without the batch axis, e.g. (1, 28, 28).
        options: auto_LiRPA's ``bound_opts`` on top of :data:`BOUND_OPTIONS`.

    Raises:
        SpecError: a shape that the model does not take, or a model whose graph auto_LiRPA gets wrong.
    """
    reference = next(model.parameters(), torch.zeros(()))
    chosen = {**BOUND_OPTIONS, **(options or {})}
    if any(isinstance(module, nn.Conv2d) and module.groups != 1 for module in model.modules()):
        chosen["conv_mode"] = "matrix"  # patches mode bounds grouped convolutions wrongly, in both versions
    try:
        example = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0)).to(reference)
        with evaluation_mode(model), torch.no_grad():
            expected = model(example)
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(
            f"input_shape {input_shape!r}, without the batch axis, does not fit the net: {reason}"
        ) from error
    with evaluation_mode(model):  # tracing must neither change running statistics nor refuse a batch of one
        bounded = _traced(model, example, chosen)
        if chosen.get("conv_mode") != "matrix" and _breaks_patches(bounded):
            bounded = _traced(model, example, {**chosen, "conv_mode": "matrix"})
    if any(type(node).__name__ == "BoundDropout" for node in bounded.modules()):
        raise SpecError("auto_LiRPA bounds Dropout with its noise even in eval mode; put nn.Identity in its place")
    mend_average_pools(bounded)
    with evaluation_mode(bounded), frozen(model), torch.no_grad():  # frozen: auto_LiRPA sets requires_grad, in its way
        _compare(bounded(example), expected)
    # auto_LiRPA shares parameters with the model but copies buffers: running statistics would go stale
    buffers = dict(model.named_buffers())
    for node in bounded.modules():
        if type(node).__name__ == "BoundBuffers" and node.ori_name in buffers:
            node.buffer = buffers[node.ori_name]
    return bounded


def _traced(model: nn.Module, example: Tensor, options: dict[str, Any]) -> BoundedModule:
    try:
        return BoundedModule(model, example, bound_opts=options, device=example.device)
    except (NotImplementedError, AssertionError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0] or "an assertion fails"
        layers = ", ".join(dict.fromkeys(type(part).__name__ for part in model.modules() if not [*part.children()]))
        raise SpecError(f"auto_LiRPA {version} cannot read this net ({reason}); its layers: {layers}") from error


def _compare(given: Tensor, expected: Tensor) -> None:
    """Refuse a graph that computes something else: bounds of it would not be the model's."""
    apart = float((given - expected).abs().max()) if given.shape == expected.shape else math.inf
    if bool(expected.isfinite().all()) and not apart <= _SAME * (1 + float(expected.abs().max())):
        raise SpecError(
            f"auto_LiRPA reads another net than the one given: their outputs differ by {apart:.3g}; replace the layer "
            "that it does not know (as a pooling with divisor_override)"
        )


def _breaks_patches(bounded: BoundedModule) -> bool:
    """Whether some nodes cannot be bounded between convolutions in auto_LiRPA's patches mode: it fails on them."""
    return any(type(node).__name__ in _NO_PATCHES for node in bounded.modules())
