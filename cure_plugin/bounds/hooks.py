"""Hooks into auto_LiRPA's classes: put in once, found again among other packages' wrappers, taken away again.

Ours is recognised by being the very function that was put there, never by an attribute: functools.wraps copies
attributes to whatever wraps it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from auto_LiRPA import BoundedModule
from auto_LiRPA.bound_ops import BoundConv, BoundRelu

from cure_plugin.bounds.channel_scaling import with_channel_scaling
from cure_plugin.bounds.coupled_relu import with_coupling
from cure_plugin.bounds.first_layer import with_exact_first_layer

MARKER = "cure_plugin_hook"
"""Attribute by which people see a hook of ours; it holds the hook itself, so a copy on a foreign wrapper is none."""

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
"""From a method to what stands in its place and calls it."""

HOOKS: tuple[tuple[type, str, Wrap], ...] = (
    (BoundedModule, "IBP_general", with_exact_first_layer),
    (BoundRelu, "bound_backward", with_coupling),
    (BoundConv, "interval_propagate", with_channel_scaling),
)
"""What this package puts into auto_LiRPA: (class, method, what to make of it)."""


@dataclass(eq=False)
class _Hook:
    """One of ours.

    Attributes:
        function: what was put in the method's place; what ``active`` switches between ours and the one below.
        below: the class's own entry before, None where it was inherited.
    """

    function: Function
    below: Any
    active: bool = True


_hooks: dict[tuple[type, str], _Hook] = {}
"""The last one put into each method, wherever other wrappers have left it since."""


def install(owner: type, method: str, make: Wrap) -> None:
    """Put a hook into a method of a class; where it is in already, it stays where it is and acts.

    One that a foreign wrapper hides (it has no ``__wrapped__``) or has taken away is replaced by a new one on top.

    Args:
        owner, method: whose method; one hook each.
        make: called with what stands there now.
    """
    hook = _hooks.get((owner, method))
    if hook is not None:
        hook.active = _within_reach(owner, method, hook)
        if hook.active:
            return
    below = getattr(owner, method)
    _hooks[owner, method] = hook = _Hook(below, vars(owner).get(method))
    hook.function = _switched(hook, make(below), below)
    setattr(owner, method, hook.function)


def uninstall(owner: type, method: str) -> None:
    """Give the method back as it was; below a foreign wrapper the hook stays, and passes everything on."""
    hook = _hooks.get((owner, method))
    if hook is None:
        return
    hook.active = False
    if vars(owner).get(method) is not hook.function:
        return
    if hook.below is None:
        delattr(owner, method)
    else:
        setattr(owner, method, hook.below)
    del _hooks[owner, method]


def installed(owner: type, method: str) -> bool:
    """Whether our hook acts in a method: on top, or below wrappers that say what they wrap."""
    hook = _hooks.get((owner, method))
    return hook is not None and hook.active and _within_reach(owner, method, hook)


def install_all() -> None:
    """Put in all :data:`HOOKS`, as importing the package does."""
    for owner, method, make in HOOKS:
        install(owner, method, make)


def uninstall_all() -> None:
    """Leave auto_LiRPA as it is without this package: sets are then bounded by their boxes where hooks were exact."""
    for owner, method, _ in HOOKS:
        uninstall(owner, method)


def _within_reach(owner: type, method: str, hook: _Hook) -> bool:
    own = hook.function
    return inspect.unwrap(getattr(owner, method), stop=lambda function: function is own) is own


def _switched(hook: _Hook, ours: Function, below: Function) -> Function:
    @functools.wraps(below)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs) if hook.active else below(*args, **kwargs)

    setattr(function, MARKER, function)
    return function
