"""A training run as text: which data, net, sets and settings; validated, with unknown keys refused."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cure_plugin.checks import check_count, check_number, check_type
from cure_plugin.datasets import DATASETS
from cure_plugin.errors import SpecError
from cure_plugin.nets import NETS, check_normalisation
from cure_plugin.registry import unknown
from cure_plugin.sets import set_spec
from cure_plugin.training.loss import LOSSES, Loss, Sabr
from cure_plugin.training.objective import CureObjective, TrainingSet
from cure_plugin.training.strategies import STRATEGIES, Strategy

_SEEDS = 2**40
"""So many: epochs are numbered on top of them in 64 bits."""

_LARGEST_RATE = 1000.0
"""Far beyond any that trains a net: Adam moves every weight by about as much. Beyond float32 torch fails."""


@dataclass(frozen=True)
class SetRecipe:
    """One set of a recipe.

    Attributes:
        set: text such as ``linf=0.1``. loss: what to train it by. attack_step: see :class:`TrainingSet`.
    """

    set: str
    loss: Loss = field(default_factory=Sabr)
    attack_step: float | None = None

    def build(self) -> TrainingSet:
        """The set as the objective takes it."""
        return TrainingSet(set_spec(self.set).build(), self.loss, self.attack_step)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as in YAML: the loss by its name, its options beside it."""
        name = LOSSES.name_of(self.loss)
        options = {key: getattr(self.loss, key) for key in LOSSES.options(name)}
        return {"set": self.set, "loss": name, **options, "attack_step": self.attack_step}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run.

    Attributes:
        data: data set name. net: net name. batch_norm: BatchNorm after every hidden layer. mean, std: of the input's
            channels, normalised inside the net; none if empty.
        sets: what to train for.
        strategy, weights, alignment, align_from, regularizer, attack_steps, relu_shrink, amp, channels_last: see
            :class:`CureObjective`.
        gradient_projection: weight beta of the natural update; 0 switches it off. project_while_annealing: from the
            first certified epoch on, else after annealing.
        start: file of a trained net to go on from (CURE-Finetune): a checkpoint, or a plain state_dict.
        epochs: in all. natural_epochs: plain training first. ramp_epochs: annealing after those.
        batch_size, learning_rate, milestones (epochs), decay (factor at each milestone, in (0, 1]).
        l1_penalty: weight of the parameters' l1 norm. clip: largest gradient l2 norm, 0 for any.
        flip, crop, pad: of training images, see :func:`augmented`; nets take inputs of the crop's size.
        seed: of initialisation, order and attacks.

    Raises:
        SpecError: a value out of range; the message names it.
    """

    data: str
    net: str
    sets: tuple[SetRecipe, ...]
    epochs: int
    ramp_epochs: float
    batch_norm: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    strategy: str = "max"
    weights: tuple[float, ...] = ()
    alignment: float = 0.0
    align_from: str = "weaker"
    gradient_projection: float = 0.0
    project_while_annealing: bool = False
    start: str = ""
    regularizer: float = 0.5
    attack_steps: int = 8
    relu_shrink: float = 1.0
    natural_epochs: int = 1
    batch_size: int = 128
    learning_rate: float = 5e-4
    milestones: tuple[int, ...] = ()
    decay: float = 0.2
    l1_penalty: float = 0.0
    clip: float = 10.0
    flip: bool = False
    crop: int = 0
    pad: int = 0
    amp: bool = False
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data not in DATASETS:
            raise SpecError(f"unknown data set {self.data!r}; known: {', '.join(DATASETS)}")
        if self.net not in NETS:
            raise SpecError(f"unknown net {self.net!r}; known: {', '.join(NETS)}")
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        for name in ("natural_epochs", "crop", "pad", "seed"):
            check_count(name, getattr(self, name))
        check_number("learning_rate", self.learning_rate, _LARGEST_RATE, zero=False)
        check_number("decay", self.decay, 1, zero=False)
        for name in ("ramp_epochs", "l1_penalty", "clip"):
            check_number(name, getattr(self, name))
        check_number("gradient_projection", self.gradient_projection, 1)
        if self.seed >= _SEEDS:
            raise SpecError(f"seed must be below {_SEEDS}, got {self.seed!r}")
        if self.natural_epochs + self.ramp_epochs > self.epochs:
            raise SpecError(
                f"annealing ends after epoch {self.natural_epochs + self.ramp_epochs:g}, but there are {self.epochs} "
                "epochs: the sets would never reach their size; raise epochs or lower ramp_epochs"
            )
        check_normalisation(self.mean, self.std)
        for milestone in self.milestones:
            check_count("milestones", milestone)
        if self.pad and not self.crop:
            raise SpecError(f"pad needs crop, the size to cut after padding; got pad {self.pad} alone")
        if self.gradient_projection > 0 and not self.projects(self.epochs - 1):
            raise SpecError(
                f"gradient_projection {self.gradient_projection!r} would never apply: annealing ends after epoch "
                f"{self.natural_epochs + self.ramp_epochs:g} of {self.epochs}; set project_while_annealing"
            )
        if self.batch_size < self.smallest_batch:
            raise SpecError(f"batch_size must be at least {self.smallest_batch} with batch_norm, got {self.batch_size}")
        self.objective()

    @property
    def combination(self) -> Strategy:
        """The strategy as an object."""
        return STRATEGIES.make(self.strategy, {"weights": self.weights} if self.weights else None)

    @property
    def smallest_batch(self) -> int:
        """Samples that a batch needs: BatchNorm takes two, in every part of it."""
        return 2 * (len(self.sets) if self.combination.divides else 1) if self.batch_norm else 1

    def projects(self, epoch: int) -> bool:
        """Whether gradient projection applies in an epoch: in certified ones, after annealing or from the first on."""
        first = self.natural_epochs + (0 if self.project_while_annealing else self.ramp_epochs)
        return self.gradient_projection > 0 and epoch >= first

    def objective(self) -> CureObjective:
        """The loss that this recipe describes."""
        return CureObjective(
            [entry.build() for entry in self.sets],
            strategy=self.combination,
            alignment=self.alignment,
            align_from=self.align_from,
            regularizer=self.regularizer,
            attack_steps=self.attack_steps,
            relu_shrink=self.relu_shrink,
            amp=self.amp,
            channels_last=self.channels_last,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as in YAML; :func:`recipe_from_mapping` gives the same recipe back."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {**plain, "sets": [entry.to_mapping() for entry in self.sets]}


def recipe_from_mapping(values: Mapping[str, Any]) -> Recipe:
    """A recipe from parsed YAML.

    Raises:
        SpecError: an unknown key (the nearest known one is named), a missing or wrongly typed value.
    """
    try:
        return Recipe(**_converted("recipe key", Recipe, values))
    except TypeError as error:
        raise SpecError(f"incomplete recipe: {error}") from error


def _converted(what: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as the dataclass ``kind`` declares them."""
    known = {field.name: field for field in fields(kind)}
    for key in values:
        if key not in known:
            raise unknown(what, key, known)
    return {key: _convert(key, str(known[key].type), value) for key, value in values.items()}


def _set_recipe(entry: Any) -> SetRecipe:
    """A set of a recipe: what it is, its loss by name, the loss's options beside it."""
    if not isinstance(entry, Mapping) or "set" not in entry:
        raise ValueError(f"each set is a mapping with a key 'set', got {entry!r}")
    name = entry.get("loss", "sabr")
    types = LOSSES.options(name)
    own = ("set", "loss", "attack_step")
    told = {key: value for key, value in entry.items() if key not in own and (key, value) not in _MEANINGLESS}
    for key in told:
        if key not in types and key not in dict(_MEANINGLESS):
            raise unknown("key of a set", key, [*own, *types])
    options = {key: _convert(key, types.get(key, "float"), value) for key, value in told.items()}
    values = {key: value for key, value in entry.items() if key in ("set", "attack_step")}
    return SetRecipe(loss=LOSSES.make(name, options), **_converted("key of a set", SetRecipe, values))


_MEANINGLESS = (("ratio", 1.0), ("mix", None))
"""What recipes of version 0.1 say of every loss, and what is the default where it means anything."""


def _convert(key: str, kind: str, value: Any) -> Any:
    """``value`` as the field's type, so that ``key=value`` text and YAML mean the same."""
    try:
        if isinstance(value, str) and kind != "str":
            value = yaml.safe_load(value)
        if key == "sets":
            if not isinstance(value, list | tuple):
                raise TypeError("a list of sets expected, such as [{set: linf=0.1, ratio: 0.4}]")
            return tuple(_set_recipe(entry) for entry in value)
        if kind == "bool":
            if not isinstance(value, bool):
                raise TypeError("true or false expected")
            return value
        if isinstance(value, bool):
            raise TypeError("a number expected")
        if kind == "int":
            if not math.isfinite(float(value)) or int(value) != float(value):
                raise ValueError("a whole number expected")
            return int(value)
        if kind == "float | None" and value is None:
            return None
        if kind.startswith("float"):
            return float(value)
        if kind.startswith("tuple"):
            if not isinstance(value, list | tuple):
                raise TypeError("a list expected, such as [5, 6]")
            return tuple(_convert(key, "int" if "int" in kind else "float", entry) for entry in value)
        return "" if value is None else str(value)
    except (TypeError, ValueError, OverflowError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"recipe key {key!r} has the unusable value {value!r}: {reason}") from error


@functools.cache
def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes inside the package; those of a file with ``methods`` are ``file/method``."""
    folder = files("cure_plugin") / "recipes"
    names = []
    for entry in folder.iterdir():
        if entry.name.endswith(".yaml"):
            name = entry.name.removesuffix(".yaml")
            methods = yaml.safe_load(entry.read_text()).get("methods")
            names += [name] if methods is None else [f"{name}/{method}" for method in methods]
    return tuple(sorted(names))


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by shipped name or YAML file path, with ``overrides`` on top.

    A file may hold ``methods``, a mapping of names to keys that differ from the file's own; its recipes are
    then named ``file/method``, e.g. ``mnist_small/scratch`` or ``my.yaml/scratch``.

    Raises:
        SpecError: no such recipe, file or method, no mapping in it, or see :func:`recipe_from_mapping`.
    """
    check_type("overrides", {} if overrides is None else overrides, Mapping, "a mapping of keys to values")
    name = str(name)
    named = re.fullmatch(r"(.*\.ya?ml)(?:/(.*))?", name)
    if named:
        method = named[2] or ""
        try:
            text = Path(named[1]).read_text()
        except (OSError, ValueError) as error:
            raise SpecError(f"cannot read recipe {name}: {error}") from error
    elif name in (known := shipped_recipes()):
        file, _, method = name.partition("/")
        text = (files("cure_plugin") / "recipes" / f"{file}.yaml").read_text()
    else:
        raise SpecError(f"{unknown('recipe', name, known)}; or give a .yaml file")
    values = _parsed(name, text)
    methods = values.pop("methods", {})
    if not isinstance(methods, dict) or not all(isinstance(keys, dict) for keys in methods.values()):
        raise SpecError(f"methods of recipe {name} must map names to mappings of keys, got {methods!r}")
    if methods or method:
        if method not in methods:
            listed = ", ".join(map(str, methods)) or "it has none"
            raise SpecError(f"recipe {name} names none of the methods in the file: {listed}")
        values = {**values, **methods[method]}
    return recipe_from_mapping({**values, **(overrides or {})})


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise SpecError(f"recipe {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SpecError(f"recipe {name} must be a mapping of keys to values, got {type(values).__name__}")
    return values
