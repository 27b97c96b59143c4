"""What people hand in as images, labels and nets, made into what this package works on, or refused by name.

What means one thing only is converted: arrays, lists, precisions that lose nothing, labels in a column, nets inside
``DataParallel`` or ``torch.compile``. What may mean two things is refused: integers that may be 0..255 or 0 and 1, rows
of scores for labels, an image without a batch axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cure_plugin.errors import SpecError, first_line

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


def like(net: nn.Module) -> Tensor:
    """A tensor of the type and on the device that ``net`` computes in: its first weight, or a buffer's, if any."""
    held = (value for value in (*net.parameters(), *net.buffers()) if value.is_floating_point())
    return next(held, torch.zeros(()))


def check_weights(net: nn.Module) -> None:
    """Refuse weights that are no finite numbers, or none yet.

    Raises:
        SpecError: lazy layers that never ran, weights on the meta device, NaN, infinity.
    """
    tensors = [*net.named_parameters(), *net.named_buffers()]
    absent = [key for key, value in tensors if is_lazy(value) or value.is_meta]
    if absent:
        raise SpecError(f"{', '.join(absent)} of the net holds no values yet; run it on an image once, or load weights")
    broken = [key for key, value in tensors if value.is_floating_point() and not all_finite(value)]
    if broken:
        raise SpecError(f"{', '.join(broken)} of the net holds NaN or infinite values; certify another checkpoint")


def check_pair(x: Any, y: Any, net: nn.Module) -> None:
    """Refuse what ``net`` cannot be trained or attacked on, before torch says less.

    Raises:
        SpecError: no float batch (B, ...) of the net's type and device, or labels that are no torch.long (B,).
    """
    check_float_batch(x, axes=1)
    if not isinstance(net, nn.Module):
        raise SpecError(f"net must be a torch.nn.Module, got {type(net).__name__}; wrap a function in a Module")
    own = like(net)
    if x.dtype != own.dtype or x.device != own.device:
        found, wanted = (f"{_name(one.dtype)} on {one.device}" for one in (x, own))
        raise SpecError(f"x is {found}, the net {wanted}; give x.to({wanted.split()[0]}) there, or convert the net")
    _check_long(y, len(x))


def check_float_batch(x: Any, axes: int = 2) -> None:
    """Refuse what no set is around.

    Args:
        axes: the fewest that it has.

    Raises:
        SpecError: no dense tensor of floating-point numbers with a batch axis.
    """
    plain = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta and not x.is_nested
    if not plain or not x.is_floating_point() or x.ndim < axes:
        shape = f"{_name(x.dtype)} {tuple(x.shape)}" if plain else type(x).__name__
        raise SpecError(f"x must be a float batch of shape (B, ...), got {shape}; add a batch axis or convert")


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass over the values, ten times as fast as ``isfinite`` of each."""
    return x.numel() == 0 or all(math.isfinite(end) for end in torch.stack(torch.aminmax(x.detach())).tolist())


def evaluated(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``net(x)``, its logits (B, C).

    Raises:
        SpecError: it fails on such an input, or gives something else.
    """
    try:
        logits = net(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a net of somebody else raises
        reason = first_line(error)
        raise SpecError(f"x of shape {tuple(x.shape)} does not fit the net: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SpecError(
            f"the net must give logits ({len(x)}, C) for x {tuple(x.shape)}, got {found}; wrap it in one that does"
        )
    return logits


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
    if not len(given):
        raise SpecError(f"x is empty (shape {shape}); give at least one image")
    same = given.to(dtype)
    if not bool((same.to(given.dtype) == given).all()) and all_finite(given):
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
    if given.is_floating_point() and not bool((given.isfinite() & (given == given.round())).all()):
        raise SpecError(f"y must be whole numbers, got {given.tolist()[:3]}")
    given = given.long()
    if classes < 2 or bool((given < 0).any() or (given >= classes).any()):
        raise SpecError(f"labels lie in {int(given.min())} .. {int(given.max())}, but the net has {classes} classes")
    return given


def check_labels(y: Tensor, classes: int, count: int | None = None) -> None:
    """Refuse what are no labels (B,) of so many classes, before an index out of range says less.

    Args:
        count: B, where it is known.

    Raises:
        SpecError: see :func:`labels`, or another type than torch.long.
    """
    _check_long(y, count)
    if not bool(((y >= 0) & (y < classes)).all()):
        raise SpecError(f"labels lie in {int(y.min())} .. {int(y.max())}, but the net has {classes} classes")


def check_generator(generator: Any) -> None:
    """Refuse all but None and a ``torch.Generator``.

    Raises:
        SpecError: anything else, as a seed.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise SpecError(
            f"generator must be a torch.Generator, got {generator!r}; give torch.Generator().manual_seed(0)"
        )


def _check_long(y: Any, count: int | None) -> None:
    if not (isinstance(y, Tensor) and y.dtype == torch.long and y.layout == torch.strided and not y.is_meta):
        found = _name(y.dtype) if isinstance(y, Tensor) else type(y).__name__
        raise SpecError(f"y must be a tensor (B,) of torch.long, got {found}; give torch.as_tensor(y).long()")
    if y.ndim != 1 or (count is not None and len(y) != count):
        raise SpecError(f"y must be ({'B' if count is None else count},), one label an image, got {tuple(y.shape)}")


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise SpecError(
                f"{name} must be a plain tensor of numbers, got one that is sparse, nested, quantised or meta"
            )
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
