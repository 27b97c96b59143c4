"""A ``BoundedModule`` with the options that keep every auto_LiRPA version sound and working."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from auto_LiRPA import BoundedModule
from auto_LiRPA import __version__ as version
from torch import Tensor, nn

from cure_plugin.bounds.elementwise import mend_elementwise
from cure_plugin.bounds.faithful import check_outputs, check_reads_no_values, check_same, uncompiled
from cure_plugin.bounds.linear_nodes import mend_linear_nodes, mend_views
from cure_plugin.bounds.max_pool import mend_max_pools
from cure_plugin.bounds.operators import PATCHES, REFUSED, unreadable, verdict
from cure_plugin.bounds.s_shaped import mend_s_shaped
from cure_plugin.bounds.self_check import violation
from cure_plugin.bounds.spelling import spelled_out
from cure_plugin.checks import check_shape
from cure_plugin.compat import first_spellings
from cure_plugin.errors import SpecError, first_line
from cure_plugin.inputs import like, plain_net
from cure_plugin.modes import evaluation_mode, frozen

BOUND_OPTIONS: dict[str, Any] = {
    # 0.3 indexes alphas by a stale mask when over 90 % of a layer is unstable.
    "sparse_features_alpha": False,
    # 0.3 asserts that unstable neurons stay as many as when the alphas were made.
    "sparse_spec_alpha": False,
}

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Whose roundings are larger than what separates nets that are certified from nets that are not."""


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
    model: nn.Module, input_shape: tuple[int, ...], options: dict[str, Any] | None = None, self_check: bool = True
) -> BoundedModule:
    """Wrap ``model`` (its parameters and buffers are shared) for inputs of shape (B, *input_shape).

    The table of :mod:`cure_plugin.bounds.operators` says whether the net is bounded in auto_LiRPA's patches mode (the
    fastest), in its matrix mode, or not at all; then the bounds of every node are tried out on random sets, and a net
    whose bounds are broken falls to matrix mode, or is refused.

    Args:
        input_shape: without the batch axis, e.g. (1, 28, 28).
        options: auto_LiRPA's ``bound_opts`` on top of :data:`BOUND_OPTIONS`.
        self_check: try the bounds out. Without it nothing finds an operator that this version of auto_LiRPA bounds
            wrongly in a way that the table does not know, and operators that are not in the table are refused.

    Raises:
        SpecError: a shape that the model does not take, or a model that auto_LiRPA gets wrong; the message names the
            node, its operator and what to do instead.
    """
    model = plain_net(model)
    input_shape = check_shape("input_shape", input_shape)
    reference = like(model)
    if reference.dtype in LOW_PRECISION:
        raise SpecError(
            f"the net's weights are {reference.dtype}, in which no bound is worth anything; wrap a copy in float64 "
            "(copy.deepcopy(net).double()), as Certifier does"
        )
    if not (options is None or isinstance(options, dict)):
        raise SpecError(f"options must be a dictionary of auto_LiRPA's bound_opts, got {options!r}")
    chosen = {**BOUND_OPTIONS, **(options or {})}
    try:
        example, expected = _example(model, input_shape)
    except Exception as error:  # whatever a net of somebody else raises
        reason = first_line(error)
        raise SpecError(
            f"input_shape {input_shape!r}, without the batch axis, does not fit the net: {reason}"
        ) from error
    if not isinstance(expected, Tensor):
        raise SpecError(
            f"the net must give a tensor, got {type(expected).__name__}; wrap it in one that gives its logits"
        )
    check_reads_no_values(model, example)
    modes = ("matrix",) if chosen.get("conv_mode") == "matrix" else ("patches", "matrix")
    accepted = _accepted(model, example, chosen, modes, self_check)
    with frozen(model):  # auto_LiRPA sets requires_grad, in its way
        check_same(accepted, model, example)
    return _shared(accepted, model)


def wrapped_again(
    bounded: BoundedModule, model: nn.Module, input_shape: tuple[int, ...], options: dict[str, Any] | None = None
) -> BoundedModule:
    """A fresh wrapper like ``bounded``, for another copy of its net (another dtype) or for other options.

    What was checked of ``bounded`` is not checked again, but for nodes without a row in the table in another dtype.

    Raises:
        SpecError: bounds that hold in the dtype of ``bounded`` fail in that of ``model``.
    """
    example, expected = _example(model, input_shape)
    chosen = {**BOUND_OPTIONS, "conv_mode": bounded.bound_opts["conv_mode"], **(options or {})}
    with evaluation_mode(model):
        again = _mended(_traced(model, example, chosen))
    if like(model).dtype != like(bounded).dtype and _has_unknown_kinds(again):
        fault = _fault(again, input_shape)
        if fault:
            raise SpecError(f"auto_LiRPA {version} does not bound this net soundly in {like(model).dtype}: {fault}")
    with frozen(model):
        check_outputs(again, example, expected)
    return _shared(again, model)


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(a random input (1, *input_shape), what ``model`` makes of it in eval mode)."""
    example = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0)).to(like(model))
    with evaluation_mode(model), torch.no_grad():
        return example, model(example)


def _shared(bounded: BoundedModule, model: nn.Module) -> BoundedModule:
    """``bounded``, sharing its buffers with ``model``."""
    # auto_LiRPA shares parameters with the model but copies buffers: running statistics would go stale
    buffers = dict(model.named_buffers())
    for node in bounded.modules():
        if type(node).__name__ == "BoundBuffers" and node.ori_name in buffers:
            node.buffer = buffers[node.ori_name]
    return bounded


def _accepted(
    model: nn.Module, example: Tensor, options: dict[str, Any], modes: Sequence[str], self_check: bool
) -> BoundedModule:
    """``model`` wrapped in the first of the ``modes`` that is sound for it."""
    fault = ""
    for mode in modes:
        with evaluation_mode(model):  # tracing must neither change running statistics nor refuse a batch of one
            bounded = _traced(model, example, {**options, "conv_mode": mode})
        if not _allows(bounded, mode, self_check):
            continue
        _mended(bounded)
        fault = _fault(bounded, tuple(example.shape[1:])) if self_check else ""
        if not fault:
            return bounded
    raise SpecError(f"auto_LiRPA {version} does not bound this net soundly: {fault}; replace that layer")


def _mended(bounded: BoundedModule) -> BoundedModule:
    """``bounded`` with nodes of ours where auto_LiRPA's are wrong, fail or waste: most in matrix mode alone."""
    mend_views(bounded)
    mend_elementwise(bounded)
    if bounded.bound_opts["conv_mode"] == "matrix":
        mend_linear_nodes(bounded)
        mend_max_pools(bounded)
        mend_s_shaped(bounded)
    return bounded


def _allows(bounded: BoundedModule, mode: str, unknown: bool) -> bool:
    """Whether the table has every node bounded soundly in ``mode``; ``unknown``: nodes without a row too.

    Raises:
        SpecError: a node that is bounded soundly in no mode.
    """
    allowed = True
    for name, node in bounded.named_children():
        sound_in, row = verdict(node)
        if row is not None and sound_in == REFUSED:
            raise SpecError(
                f"node {name} of the net, {row.layers}, is not bounded soundly by auto_LiRPA {version}: {row.reason}"
            )
        if row is None and not unknown:
            kind = type(node).__name__.removeprefix("Bound")
            raise SpecError(f"node {name} of the net is a {kind}, of which nothing is known; leave self_check=True")
        allowed = allowed and (mode == "matrix" or sound_in == PATCHES)
    return allowed


def _fault(bounded: BoundedModule, input_shape: tuple[int, ...]) -> str:
    """What is wrong with the bounds of ``bounded``; empty: nothing was found."""
    reference = like(bounded)
    try:
        with evaluation_mode(bounded), frozen(bounded), default_dtype(reference.dtype):
            return violation(bounded, input_shape, _has_unknown_kinds(bounded)) or ""
    except Exception as error:  # auto_LiRPA's failures have no common class
        return f"its bounds fail ({type(error).__name__}: {str(error).partition(chr(10))[0] or 'an assertion'})"


def _has_unknown_kinds(bounded: BoundedModule) -> bool:
    """Whether the table has no row for some node."""
    return any(verdict(node)[1] is None for node in bounded.children())


def _traced(model: nn.Module, example: Tensor, options: dict[str, Any]) -> BoundedModule:
    """``model`` as auto_LiRPA reads it.

    Raises:
        SpecError: it cannot; the message says which operator or layer stands in the way.
    """
    log = logging.getLogger("auto_LiRPA")
    said = _Said()
    before, log.propagate, handlers, log.handlers = log.propagate, False, log.handlers, [said]
    try:
        with (
            default_dtype(example.dtype),
            uncompiled(),
            first_spellings(),
            spelled_out(model),
            redirect_stdout(io.StringIO()),
        ):
            return BoundedModule(model, example, bound_opts=options, device=example.device)
    except Exception as error:  # auto_LiRPA's failures have no common class
        names = dict.fromkeys(type(part).__name__ for part in model.modules() if not [*part.children()])
        known = [f"{name}: {remedy}" for name in names if (remedy := unreadable(name)) is not None]
        reason = "; ".join(known) or said.operators() or _reason(error)
        raise SpecError(
            f"auto_LiRPA {version} cannot read this net ({reason}); its layers: {', '.join(names)}"
        ) from error
    finally:
        log.propagate, log.handlers = before, handlers


def _reason(error: BaseException) -> str:
    """What failed first, in a line: 0.7.1 prints that (which is caught, as it is long) and raises another."""
    if error.__context__ is not None:
        return _reason(error.__context__)
    return str(error).partition("\n")[0] or "an assertion fails"


class _Said(logging.Handler):
    """What auto_LiRPA logs of operators that it does not know."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def operators(self) -> str:
        found = dict.fromkeys(re.findall(r"Name: (\S+?),", "\n".join(self._messages)))
        return f"it knows no {', '.join(found)}" if found else ""
