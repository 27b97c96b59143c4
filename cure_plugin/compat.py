"""The one place that knows auto_LiRPA's versions: mends 0.3 on modern stacks, leaves 0.7.1 alone.

auto_LiRPA 0.3 (the newest on PyPI) fails on numpy 2 / torch 2 for four reasons: the module
``numpy.lib.arraysetops`` and the name ``numpy.bool`` went away, as did
``torch.onnx.symbolic_helper._set_opset_version`` and subscripting of traced graph nodes.
:func:`import_auto_lirpa` supplies exactly those that are missing, imports auto_LiRPA, and takes
back what only the import needed. (A fifth, ``BoundedModule.parameters()``, only matters in matrix
mode.) Nothing is done if auto_LiRPA is already imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from cure_plugin.errors import MissingDependencyError

INSTALL_HINTS = {
    "torch": "torch is not installed; all of cure_plugin but benchmark generators needs it: pip install torch",
    "auto_LiRPA": "auto_LiRPA is not installed; cure_plugin extends 0.3 or 0.7.1: pip install --no-deps "
    "auto_LiRPA==0.3, or clone github.com/Verified-Intelligence/auto_LiRPA and pip install --no-deps ./auto_LiRPA",
}
"""What sets, bounds and training need, and how to install it, in one line each."""


def _exporter(module: str) -> Any:
    """A module of torch's exporter of traced graphs; None before torch 2.9, which has it elsewhere."""
    name = "torch.onnx._internal.torchscript_exporter"
    return importlib.import_module(f"{name}.{module}") if find_spec(name) is not None else None


def _set_opset_version(opset_version: int) -> None:
    """What torch < 2 called to fix the operator set of a traced graph."""
    place = _exporter("_globals") or importlib.import_module("torch.onnx._globals")
    place.GLOBALS.export_onnx_opset_version = opset_version


_FIRST_SPELLINGS = 10
"""Operator set up to which a fresh process knows how to spell torch's operators in a traced graph."""


@contextmanager
def first_spellings() -> Iterator[None]:
    """While it lasts, traced graphs are spelled as in a process that has exported nothing.

    torch loads the spellings of later operator sets with the first ``torch.onnx.export``; auto_LiRPA, which takes the
    latest that it finds, then no longer reads padding, for instance.
    """
    registration = _exporter("registration")
    if registration is None:
        yield
        return
    group = registration._SymbolicFunctionGroup
    original = group.get

    def get(self: Any, opset: int) -> Any:
        return original(self, min(opset, _FIRST_SPELLINGS)) or original(self, opset)

    group.get = get
    try:
        yield
    finally:
        group.get = original


def _node_getitem(node: Any, attribute: str) -> Any:
    """``node[attribute]`` of a traced graph node, as torch < 2 offered it."""
    return getattr(node, node.kindOf(attribute))(attribute)


@contextmanager
def _names_needed_by_0_3() -> Iterator[None]:
    """Supply the vanished names; those needed at run time stay, the others go after the import."""
    import torch
    import torch.onnx.symbolic_helper as symbolic_helper

    if not hasattr(np, "bool"):
        setattr(np, "bool", np.bool_)  # noqa: B010  (numpy 1.24 to 1.26)
    if not hasattr(torch._C.Node, "__getitem__"):
        setattr(torch._C.Node, "__getitem__", _node_getitem)  # noqa: B010
    stub_name = "numpy.lib.arraysetops"
    add_stub = stub_name not in sys.modules and find_spec(stub_name) is None
    add_opset = not hasattr(symbolic_helper, "_set_opset_version")
    if add_stub:
        stub = ModuleType(stub_name)
        stub.isin = np.isin  # type: ignore[attr-defined]
        sys.modules[stub_name] = stub
    if add_opset:
        symbolic_helper._set_opset_version = _set_opset_version  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if add_stub:
            del sys.modules[stub_name]
        if add_opset:
            del symbolic_helper._set_opset_version  # type: ignore[attr-defined]


@contextmanager
def _no_word_of_cuda() -> Iterator[None]:
    """Auto_LiRPA loads torch's compiler of extensions, which warns where CUDA is installed and no GPU is there."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def missing_package() -> str | None:
    """The first of torch and auto_LiRPA that is not installed; None where both are. Imports neither."""
    return next((name for name in INSTALL_HINTS if sys.modules.get(name) is None and find_spec(name) is None), None)


def import_auto_lirpa() -> ModuleType:
    """Import auto_LiRPA, mended where its version needs it, and return the package.

    Raises:
        MissingDependencyError: torch or auto_LiRPA is not installed; the line says how to install it.
    """
    loaded = sys.modules.get("auto_LiRPA")
    if loaded is not None:
        return loaded
    missing = missing_package()
    if missing is not None:
        raise MissingDependencyError(INSTALL_HINTS[missing])
    # auto_LiRPA changes the process's warning filters as it is imported, and calls what torch deprecates.
    with warnings.catch_warnings(record=True), _no_word_of_cuda(), _names_needed_by_0_3():
        package = importlib.import_module("auto_LiRPA")
    _accept_remove_duplicate(package.BoundedModule)
    _make_tables_once(importlib.import_module("auto_LiRPA.operators"))
    return package


def _accept_remove_duplicate(bounded_module: Any) -> None:
    """Let 0.3's ``BoundedModule.parameters()`` take the argument that torch 2 passes along."""
    original = bounded_module._named_members
    if "remove_duplicate" in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def named_members(self: Any, *args: Any, remove_duplicate: bool = True, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    bounded_module._named_members = named_members


_TABLES = ("x_limit", "step_pre", "num_points_pre", "d_lower", "d_upper")
"""What a Tanh or Sigmoid node keeps of its tangents."""


def _make_tables_once(operators: Any) -> None:
    """Let Tanh nodes share the tables of tangents that each makes of 50,000 points (0.2 s), and Sigmoid nodes theirs.

    Of these two alone the function is that of the class, and not of the node as a power's.
    """
    import torch

    fixed = (operators.BoundTanh, operators.BoundSigmoid)
    made: dict[Any, dict[str, Any]] = {}

    def sharing(original: Any) -> Any:
        @functools.wraps(original)
        def precompute_relaxation(self: Any, *args: Any, **kwargs: Any) -> None:
            if type(self) not in fixed or kwargs:
                original(self, *args, **kwargs)
                return
            key = (type(self), self.device, torch.get_default_dtype())
            if key not in made:
                with torch.inference_mode(False):
                    original(self, *args)
                made[key] = {name: self.__dict__[name] for name in _TABLES if name in self.__dict__}
            self.__dict__.update(made[key])

        return precompute_relaxation

    owners = {next(base for base in node.__mro__ if "precompute_relaxation" in vars(base)) for node in fixed}
    for owner in owners:
        owner.precompute_relaxation = sharing(owner.precompute_relaxation)


def patch_bounds_are_flat() -> bool:
    """Whether this auto_LiRPA adds up bounds of ``Patches`` flattened (0.7) or as images (0.3)."""
    return find_spec("auto_LiRPA.concretize_bounds") is not None
