"""What people hand in as images, labels and nets, made into what this package works on, or refused by name.

What means one thing only is converted: arrays, lists, precisions that lose nothing, labels in a column, nets inside
``DataParallel`` or ``torch.compile``. What may mean two things is refused: integers that may be 0..255 or 0 and 1, rows
of scores for labels, an image without a batch axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cure_plugin.errors import SpecError

_WRAPPED = ("module", "_orig_mod")
"""Where DataParallel (and its like) and torch.compile keep the net."""


def plain_net(net: Any) -> nn.Module:
    """The net itself, out of what wraps it to run it faster.

    Raises:
        SpecError: no ``torch.nn.Module``.
    """
    if not isinstance(net, nn.Module):
        raise SpecError(f"net must be a torch.nn.Module, got {type(net).__name__}; wrap a function in a Module")
    wrapper = type(net).__name__
    if isinstance(net, nn.DataParallel) or wrapper in ("DistributedDataParallel", "OptimizedModule"):
        return plain_net(next(getattr(net, name) for name in _WRAPPED if hasattr(net, name)))
    return net


def images(x: Any, input_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``x`` as a batch (B, *input_shape) of that floating-point type.

    Args:
        x: a tensor, an array, or nested lists of numbers.

    Raises:
        SpecError: another shape, whole numbers, or values that ``dtype`` cannot hold.
    """
    given = _tensor("x", x).detach()
    if not given.is_floating_point():
        remedy = "give what the net takes, as x.float() / 255 for pixels of 0 to 255"
        raise SpecError(f"x is {_name(given.dtype)}; {remedy}")
    shape = tuple(given.shape)
    if shape[1:] != tuple(input_shape):
        raise SpecError(f"x must be (B, {', '.join(map(str, input_shape))}), got {shape}{_remedy(shape, input_shape)}")
    same = given.to(dtype)
    if not bool((same.to(given.dtype) == given).all()) and bool(given.isfinite().all()):
        kinds = _name(given.dtype), _name(dtype)
        raise SpecError(f"x is {kinds[0]}, which the net's {kinds[1]} cannot hold; round x, or convert the net")
    return same


def labels(y: Any, count: int, classes: int) -> Tensor:
    """``y`` as whole numbers (B,) below ``classes``.

    Args:
        y: a tensor, an array or a list, one label an image; a column (B, 1) too.
        count: B.

    Raises:
        SpecError: another shape, no whole numbers, or no classes.
    """
    given = _tensor("y", y)
    shape = tuple(given.shape)
    if len(shape) == 2 and shape[1] == 1:
        given = given[:, 0]
    if len(shape) == 2 and shape[1] == classes and classes > 1:
        raise SpecError(f"y must be labels ({count},), got scores or one-hot rows {shape}; give y.argmax(1)")
    if tuple(given.shape) != (count,):
        raise SpecError(f"y must be ({count},), one label an image, got {shape}")
    if given.dtype == torch.bool or given.is_complex():
        raise SpecError(f"y is {_name(given.dtype)}; give the classes' numbers")
    if given.is_floating_point() and not bool((given == given.round()).all()):
        raise SpecError(f"y must be whole numbers, got {given[given != given.round()][0].item():g}")
    if classes < 2 or bool((given < 0).any() or (given >= classes).any()):
        raise SpecError(f"labels lie in {int(given.min())} .. {int(given.max())}, but the net has {classes} classes")
    return given.long()


def check_labels(y: Tensor, classes: int) -> None:
    """Refuse what are no labels (B,) of so many classes, before an index out of range says less.

    Raises:
        SpecError: see :func:`labels`, or another type than torch.long.
    """
    usual = isinstance(y, Tensor) and y.dtype == torch.long and y.ndim == 1
    if not (usual and bool(((y >= 0) & (y < classes)).all())):
        given = labels(y, len(_tensor("y", y)) if np.ndim(y) else 1, classes)
        raise SpecError(f"y must be a tensor of torch.long; give torch.tensor({given.tolist()[:3]} ...)")


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        what = f"{type(value).__name__}" + (f" {value!r}" if isinstance(value, str) else "")
        raise SpecError(f"{name} must be a tensor, an array or lists of numbers, got {what}") from error


def _remedy(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if shape == tuple(wanted):
        return "; add a batch axis, x[None]"
    if len(shape) == 4 and len(wanted) == 3 and (shape[3], *shape[1:3]) == tuple(wanted):
        return "; channels come first, x.permute(0, 3, 1, 2)"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
