"""Variants by name: the package's own, and those that other packages register through entry points."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from cure_plugin.errors import SpecError, first_line

T = TypeVar("T")


def unknown(what: str, name: Any, known: Iterable[str]) -> SpecError:
    """The error for a name that is none of the ``known``; the nearest is offered."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return SpecError(f"unknown {what} {name!r}; {hint}known: {', '.join(names)}")


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot stand in a spec, a recipe or a file's name.

    Raises:
        SpecError: such a name.
    """
    if not name or not name.replace("_", "").replace("-", "").isalnum():
        raise SpecError(f"the name of a {what} is made of letters, digits, _ and -, got {name!r}")


def check_free(what: str, name: str, holder: Any, claimant: Any) -> None:
    """Refuse ``claimant`` (a class or function) a name that ``holder`` has, if anybody has it.

    Running the same definition again, as reloads and notebooks do, replaces it.

    Raises:
        SpecError: the name is taken.
    """
    if holder is not None and _origin(holder) != _origin(claimant):
        raise SpecError(f"a {what} named {name!r} is registered already; choose another name")


def _origin(made: Any) -> tuple[str, str]:
    return made.__module__, getattr(made, "__qualname__", repr(made))


def _load(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:
        owner = f"package {entry.dist.name!r}" if entry.dist else "a package"
        raise SpecError(
            f"{owner} names {entry.value!r} in the entry-point group {entry.group}, but importing it fails: "
            f"{type(error).__name__}: {first_line(error)}; mend or uninstall that package"
        ) from error


@functools.cache
def load_installed(group: str, former: str = "") -> None:
    """Import, once, what installed packages name in an entry-point group: their modules register what is in them.

    Args:
        former: what the group was called before; it is read for a release more, with a DeprecationWarning.

    Raises:
        SpecError: an import fails; the message names the package to mend or to uninstall.
    """
    for entry in entry_points(group=group):
        _load(entry)
    for entry in entry_points(group=former) if former else ():
        warnings.warn(
            f"entry point {entry.name} is in {former}, which is now {group}", DeprecationWarning, stacklevel=2
        )
        _load(entry)


class Registry(Generic[T]):
    """Classes of one kind by name: frozen dataclasses whose fields are their options.

    A package makes its classes known without being imported first by naming their modules in the entry-point group.

    Args:
        what: the kind, in words, for messages.
        group: of entry points, e.g. ``cure_plugin.losses``.

    >>> SHAPES: Registry[object] = Registry("shape", "doctest.shapes")
    >>> @SHAPES.register("disc")
    ... class Disc: pass
    >>> SHAPES.names(), type(SHAPES.make("disc")).__name__
    (['disc'], 'Disc')
    """

    def __init__(self, what: str, group: str) -> None:
        self.what, self.group = what, group
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Decorator: make a class known by ``name``; running the same definition again (a notebook) replaces it.

        Raises:
            SpecError: a malformed name, or one that another class has.
        """
        check_name(self.what, name)

        def add(cls: type[T]) -> type[T]:
            check_free(self.what, name, self._classes.get(name), cls)
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, those of installed packages included."""
        load_installed(self.group)
        return list(self._classes)

    def named(self, name: Any) -> type[T]:
        """The class of that name.

        Raises:
            SpecError: there is none; the nearest name is offered.
        """
        if not isinstance(name, str) or (name not in self._classes and name not in self.names()):
            raise unknown(self.what, name, self.names())
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def name_of(self, variant: T) -> str:
        """The name that the class of ``variant`` is registered by.

        Raises:
            SpecError: by none.
        """
        for name, cls in self._classes.items():
            if cls is type(variant):
                return name
        raise SpecError(f"{type(variant).__name__} is no registered {self.what}; known: {', '.join(self.names())}")

    def options(self, name: Any) -> dict[str, str]:
        """What the variant of that name can be told, and of what type that is, as declared."""
        cls = self.named(name)
        return {field.name: str(field.type) for field in fields(cls) if field.init} if is_dataclass(cls) else {}

    def make(self, name: Any, options: Mapping[str, Any] | None = None) -> T:
        """The variant of that name with ``options``.

        Raises:
            SpecError: an unknown name or option, an option missing or out of range.
        """
        cls, known = self.named(name), self.options(name)
        for key in options or {}:
            if key not in known:
                listed = ", ".join(known) or "none"
                raise SpecError(f"{key} means nothing to {self.what} {name!r}; its options: {listed}")
        given = dict(options or {})
        missing = [key for key in self._required(cls) if key not in given]
        if missing:
            raise SpecError(f"{self.what} {name!r} needs {', '.join(missing)}")
        return cls(**given)

    @staticmethod
    def _required(cls: type[T]) -> list[str]:
        declared = fields(cls) if is_dataclass(cls) else ()
        return [field.name for field in declared if field.default is MISSING and field.default_factory is MISSING]
