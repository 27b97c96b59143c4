"""A device that is not there: tensors say that they are elsewhere, refuse to meet the CPU's, and compute on the CPU.

``lazy`` lends its name, which every build of torch knows and nothing else uses; tensors have values, so that code that
looks at them runs to its end. The rules are those of CUDA: tensors of two devices do not meet, but for numbers
(no axis) in arithmetic and for indices on the CPU, and what reads a value waits for the device and is counted.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from auto_LiRPA import BoundedModule, BoundedTensor
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from cure_plugin.bounds import module

DEVICE = torch.device("lazy")

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_LISTS = (_aten.cat.default, _aten.stack.default)
_WAITS = (
    _aten._local_scalar_dense.default,  # item, float(), if
    _aten.equal.default,
    _aten.nonzero.default,  # and indices of bool, which are made by it
    _aten.masked_select.default,
    _aten.is_nonzero.default,
    _aten.unique_consecutive.default,
    _aten._unique2.default,
)


class _Generator(torch.Generator):
    """Of any device, that of :data:`DEVICE` included."""

    elsewhere = False

    def __new__(cls, device: Any = "cpu") -> _Generator:
        elsewhere = torch.device(device) == DEVICE
        one = super().__new__(cls, "cpu" if elsewhere else device)
        one.elsewhere = elsewhere
        return one


class _AlsoTensor(type(Tensor)):  # type: ignore[misc]
    """auto_LiRPA asks for ``type(x) == Tensor``."""

    def __eq__(cls, other: object) -> bool:
        return other is Tensor or super().__eq__(other)

    __hash__ = type.__hash__


class Elsewhere(Tensor, metaclass=_AlsoTensor):
    """A tensor of the device; ``inner`` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        twin = Elsewhere(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        vars(twin).update({key: value for key, value in vars(self).items() if key != "inner"})  # a parameter stays one
        return memo.setdefault(id(self), twin)

    def as_subclass(self, cls: Any) -> Any:
        return self.view_as(self)  # an Elsewhere, whatever this is

    def tolist(self) -> Any:  # of a subclass torch refuses it
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor elsewhere, outside of pretending()")


class _BoundedElsewhere(BoundedTensor, Elsewhere):
    """What ``BoundedTensor(x, perturbation)`` is for an ``x`` of the device."""

    def __new__(cls, x: Elsewhere, ptb: Any = None) -> _BoundedElsewhere:
        return Elsewhere.__new__(cls, x.inner)  # type: ignore[return-value]

    def __init__(self, x: Elsewhere, ptb: Any = None) -> None:
        self.inner, self.ptb = x.inner, ptb

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.view_as(self).to(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Moves tensors made of numbers, and refuses random ones from a generator of another device than theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            args = (args[0], _places(args[1]), *args[2:])
        found = func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "elsewhere", False) != isinstance(found, Elsewhere):
            raise RuntimeError(f"{func.__name__}: the generator is of another device than the numbers")
        return found


class Pretending(TorchDispatchMode):
    """While it is entered, tensors can be on :data:`DEVICE`.

    Attributes:
        waits: how often the host waited for the device, by the line of cure_plugin that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._factories, self._unfused = _Factories(), torch.jit.optimized_execution(False)

    def __enter__(self) -> Pretending:
        self._factories.__enter__()
        self._unfused.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._unfused.__exit__(*reason)
        self._factories.__exit__(*reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        there = any(isinstance(one, Elsewhere) for one in tensors)
        if there and func not in _COPIES:
            _meet(func, args, tensors)
        if there and self._waits_for(func, args, kwargs):
            self.waits[_place()] += 1
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
            there = torch.device(device) == DEVICE
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func is _aten._to_copy.default and device is not None and not there and len(tensors) == 1:
            return found.clone() if found is _inner(tensors[0]) else found
        found = tree_map(_elsewhere, found) if there else found
        return return_and_correct_aliasing(func, args, kwargs, found) if there else found

    @staticmethod
    def _waits_for(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        if func is _aten._to_copy.default:
            device = kwargs.get("device")
            return device is not None and torch.device(device) != DEVICE
        if func is _aten.copy_.default:
            return not isinstance(args[0], Elsewhere)
        if func in _INDEXED:  # places of a mask have to be counted
            return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        return func in _WAITS


def _meet(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Refuse what CUDA refuses."""
    if func in _INDEXED:
        here = [args[0], *args[2:3]]
        strangers = [one for one in here if isinstance(one, Tensor) and not isinstance(one, Elsewhere)]
        strangers = [one for one in strangers if one is args[0] or one.ndim > 0]
    else:
        strangers = [one for one in tensors if not isinstance(one, Elsewhere) and (one.ndim > 0 or func in _LISTS)]
    if strangers:
        shapes = ", ".join(str(tuple(one.shape)) for one in strangers)
        raise RuntimeError(f"{func}: expected all tensors on one device, found some on the CPU too: {shapes}")


def _places(index: Any) -> Any:
    """``index`` with tensors on the device for lists of numbers."""
    if isinstance(index, tuple):
        return tuple(map(_places, index))
    return torch.tensor(index, dtype=torch.long).to(DEVICE) if isinstance(index, list) else index


def _place() -> str:
    """The innermost line of cure_plugin that is being run."""
    frame = sys._getframe()
    while frame is not None and "/cure_plugin/" not in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/cure_plugin/')[2]}:{frame.f_lineno}"


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, Elsewhere) else one


def _elsewhere(one: Any) -> Any:
    return Elsewhere(one) if isinstance(one, Tensor) and not isinstance(one, Elsewhere) else one


def _here(model: nn.Module) -> nn.Module:
    """A copy on the CPU."""
    model = copy.deepcopy(model)
    for part in model.modules():
        for name, one in part._parameters.items():
            part._parameters[name] = None if one is None else nn.Parameter(_inner(one), one.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = _inner(value)
    return model


def lend(patch: pytest.MonkeyPatch) -> None:
    """What torch cannot do on a device that is not there: generators, and tracing a net, which is done on the CPU."""
    traced, bounded = module._traced, BoundedTensor.__new__

    def elsewhere(model: nn.Module, example: Tensor, options: dict[str, Any]) -> BoundedModule:
        there = example.device == DEVICE
        with _disable_current_modes():
            bounded = traced(_here(model) if there else model, _inner(example), options)
        return bounded.to(DEVICE) if there else bounded

    def bounded_tensor(cls: Any, x: Tensor, ptb: Any = None) -> Any:
        if isinstance(x, Elsewhere):
            return _BoundedElsewhere(x, ptb)
        with _disable_current_modes():
            return bounded(cls, x, ptb)

    patch.setattr(BoundedTensor, "__new__", bounded_tensor)
    patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    # net.double() makes new parameters
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(module, "check_reads_no_values", lambda model, example: None)
    patch.setattr(module, "_traced", elsewhere)
