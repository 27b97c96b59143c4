"""A training run as text: which data, net, sets and settings; validated, with unknown keys refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import cattrs
import yaml

from cure_plugin.checks import check_count, check_number, check_type
from cure_plugin.datasets import DATASETS
from cure_plugin.errors import SpecError
from cure_plugin.nets import NETS, check_normalisation
from cure_plugin.registry import unknown
from cure_plugin.sets import parse_number, perturbation_from_spec
from cure_plugin.training.loss import LOSSES, Blended, Loss, Sabr
from cure_plugin.training.objective import CureObjective, TrainingSet
from cure_plugin.training.strategies import STRATEGIES, Strategy

_Kind = TypeVar("_Kind")

_SEEDS = 2**40
"""So many: epochs are numbered on top of them in 64 bits."""

_LARGEST_RATE = 1000.0
"""Far beyond any that trains a net: Adam moves every weight by about as much. Beyond float32 torch fails."""


@dataclass(frozen=True)
class SetRecipe:
    """One set of a recipe.

    Attributes:
        set: text such as ``linf=0.1``. loss: what to train it by; in YAML its name, its options, and perhaps ``blend``,
            a mapping of :class:`Blended`'s. attack_step, every: see :class:`TrainingSet`.
    """

    set: str
    loss: Loss = field(default_factory=Sabr)
    attack_step: float | None = None
    every: int = 1

    def build(self) -> TrainingSet:
        """The set as the objective takes it."""
        return TrainingSet(perturbation_from_spec(self.set), self.loss, self.attack_step, self.every)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as in YAML: the loss by its name, its options beside it."""
        blend = None
        loss = self.loss
        if isinstance(loss, Blended):
            blend, loss = {key: getattr(loss, key) for key in _BLEND}, loss.loss
        name = LOSSES.name_of(loss)
        options = {key: getattr(loss, key) for key in LOSSES.options(name)}
        others = {"attack_step": self.attack_step, "every": self.every, "blend": blend}
        return {"set": self.set, "loss": name, **options, **others}


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run.

    Attributes:
        data: data set name. net: net name. batch_norm: BatchNorm after every hidden layer. mean, std: of the input's
            channels, normalised inside the net; none if empty.
        sets: what to train for.
        strategy, weights, alignment, align_from, regularizer, natural, attack_steps, relu_shrink, amp, channels_last:
            see :class:`CureObjective`.
        gradient_projection: weight beta of the natural update; 0 switches it off. project_while_annealing: from the
            first certified epoch on, else after annealing.
        start: file of a trained net to go on from (CURE-Finetune): a checkpoint, a plain state_dict, or ``zoo:NAME``.
        epochs: in all. natural_epochs: plain training first. ramp_epochs: annealing after those.
        batch_size, learning_rate, milestones (epochs), decay (factor at each milestone, in (0, 1]).
        cooldown_epochs: last epochs, over which the rate falls to 0, a little with every batch.
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
    natural: float = 0.0
    attack_steps: int = 8
    relu_shrink: float = 1.0
    natural_epochs: int = 1
    batch_size: int = 128
    learning_rate: float = 5e-4
    milestones: tuple[int, ...] = ()
    decay: float = 0.2
    cooldown_epochs: float = 0.0
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
        for name in ("ramp_epochs", "cooldown_epochs", "l1_penalty", "clip"):
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
            natural=self.natural,
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
    """A recipe from parsed YAML; text means what YAML reads in it, and fractions are numbers too.

    Raises:
        SpecError: an unknown key (the nearest known one is named), a missing or wrongly typed value.
    """
    return _read("recipe key", Recipe, values)


def _read(what: str, kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """``values`` as the dataclass ``kind`` declares them; ``what`` is what its keys are called."""
    if not isinstance(values, Mapping):
        raise SpecError(f"a mapping of keys to values expected, got {values!r}")
    try:
        return _CONVERTER.structure(values, kind)
    except cattrs.ClassValidationError as error:
        of_keys, others = error.group_exceptions()
        for other in others:
            if not isinstance(other, cattrs.ForbiddenExtraKeysError):
                raise other from None  # a value out of range
            key = next(key for key in values if key in other.extra_fields)
            known = [field.name for field in fields(other.cl)]
            raise unknown(what, key, known) from error
        (reason, note), *_ = of_keys
        if note.name not in values:
            raise SpecError(f"{what} {note.name!r} is missing") from error
        said = " ".join(str(reason).split())
        raise SpecError(f"{what} {note.name!r} has the unusable value {values[note.name]!r}: {said}") from error


def _number(value: Any, _: Any) -> float:
    value = _meant(value)
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise ValueError("a number expected")
    return parse_number(value, "it") if isinstance(value, str) and "/" in value else float(value)


def _whole_number(value: Any, kind: Any) -> int:
    number = _number(value, kind)
    if not number.is_integer():
        raise ValueError("a whole number expected")
    return int(number)


def _flag(value: Any, _: Any) -> bool:
    value = _meant(value)
    if not isinstance(value, bool):
        raise ValueError("true or false expected")
    return value


def _list(value: Any, kind: Any) -> tuple[Any, ...]:
    value, entry = _meant(value), get_args(kind)[0]
    if not isinstance(value, list | tuple):
        sets = "a list of sets expected, such as [{set: linf=0.1, ratio: 0.4}]"
        raise ValueError(sets if entry is SetRecipe else "a list expected, such as [5, 6]")
    if entry is SetRecipe:
        return tuple(_set_recipe(one) for one in value)
    return tuple(_CONVERTER.structure(one, entry) for one in value)


def _set_recipe(entry: Any) -> SetRecipe:
    """A set of a recipe: what it is, its loss by name, the loss's options beside it."""
    if not isinstance(entry, Mapping):
        raise SpecError(f"a mapping of keys to values expected, got {entry!r}")
    if "set" not in entry:
        raise SpecError(f"key of a set 'set' is missing in {entry!r}")
    name = entry.get("loss", "sabr")
    own: dict[str, Any] = {"set": str, "attack_step": float | None, "every": int}
    options = get_type_hints(LOSSES.named(name))
    blend = entry.get("blend")
    if blend is not None and not isinstance(blend, Mapping):
        raise SpecError(f"key of a set 'blend' must map some of {', '.join(_BLEND)} to values, got {blend!r}")
    told = {
        key: value for key, value in entry.items() if key not in ("loss", "blend") and (key, value) not in _MEANINGLESS
    }
    kinds = {**dict.fromkeys(dict(_MEANINGLESS), float), **{key: options[key] for key in LOSSES.options(name)}, **own}
    for key in told:
        if key not in kinds:
            raise unknown("key of a set", key, [*own, "loss", "blend", *LOSSES.options(name)])
    values = {key: _structured(key, value, kinds[key]) for key, value in told.items()}
    kept = {key: values.pop(key) for key in own if key in values}
    loss = LOSSES.make(name, values)
    if blend is not None:
        for key in blend:
            if key not in _BLEND:
                raise unknown("key of blend", key, list(_BLEND))
        if "share" not in blend:
            raise SpecError("key of blend 'share' is missing: the part of the set's own loss, in (0, 1]")
        loss = Blended(loss, **{key: _structured(key, value, _BLEND[key]) for key, value in blend.items()})
    return SetRecipe(loss=loss, **kept)


_BLEND: dict[str, Any] = {"share": float, "attacked": bool, "vectors": bool}
"""Keys of ``blend``, see :class:`Blended`."""


_MEANINGLESS = (("ratio", 1.0), ("mix", None))
"""What recipes of version 0.1 say of every loss, and what is the default where it means anything."""


def _structured(key: str, value: Any, kind: Any) -> Any:
    try:
        return _CONVERTER.structure(value, kind)
    except (ValueError, TypeError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise SpecError(f"key of a set {key!r} has the unusable value {value!r}: {said}") from error


def _meant(value: Any) -> Any:
    """``value``, where it is text what YAML reads in it: so ``key=value`` and a file mean the same."""
    return yaml.safe_load(value) if isinstance(value, str) else value


_CONVERTER = cattrs.Converter(forbid_extra_keys=True)
_CONVERTER.register_structure_hook(float, _number)
_CONVERTER.register_structure_hook(int, _whole_number)
_CONVERTER.register_structure_hook(bool, _flag)
_CONVERTER.register_structure_hook(str, lambda value, _: "" if value is None else str(value))
_CONVERTER.register_structure_hook_func(lambda kind: get_origin(kind) is tuple, _list)


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
