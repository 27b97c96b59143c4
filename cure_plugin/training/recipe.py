"""A training run as text: which data, net, sets and settings; validated, with unknown keys refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cure_plugin.datasets import DATASETS
from cure_plugin.errors import SpecError
from cure_plugin.nets import NETS
from cure_plugin.sets import set_spec
from cure_plugin.training.objective import CureObjective, TrainingSet


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run.

    Attributes:
        data: data set name. net: net name. batch_norm: BatchNorm after every hidden layer.
        sets: (set as ``norm=eps``, ratio lambda of its SABR region) pairs.
        strategy, weights, alignment, align_from, regularizer, attack_steps: see :class:`CureObjective`.
        gradient_projection: weight beta of the natural update after annealing; 0 switches it off.
        epochs: in all. natural_epochs: plain training first. ramp_epochs: annealing after those.
        batch_size, learning_rate, milestones (epochs), decay (factor at each milestone).
        l1_penalty: weight of the parameters' l1 norm. clip: largest gradient l2 norm.
        seed: of initialisation, order and attacks.

    Raises:
        SpecError: a value out of range; the message names it.
    """

    data: str
    net: str
    sets: tuple[tuple[str, float], ...]
    epochs: int
    ramp_epochs: float
    batch_norm: bool = False
    strategy: str = "max"
    weights: tuple[float, ...] = ()
    alignment: float = 0.0
    align_from: str = "weaker"
    gradient_projection: float = 0.0
    regularizer: float = 0.5
    attack_steps: int = 8
    natural_epochs: int = 1
    batch_size: int = 128
    learning_rate: float = 5e-4
    milestones: tuple[int, ...] = ()
    decay: float = 0.2
    l1_penalty: float = 0.0
    clip: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data not in DATASETS:
            raise SpecError(f"unknown data set {self.data!r}; known: {', '.join(DATASETS)}")
        if self.net not in NETS:
            raise SpecError(f"unknown net {self.net!r}; known: {', '.join(NETS)}")
        for name in ("epochs", "batch_size", "learning_rate", "decay", "clip"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("ramp_epochs", "natural_epochs", "l1_penalty", "attack_steps", "regularizer"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"{name} must be >= 0, got {getattr(self, name)!r}")
        if not 0 <= self.gradient_projection <= 1:
            raise SpecError(f"gradient_projection must lie in [0, 1], got {self.gradient_projection!r}")
        self.objective()

    def objective(self) -> CureObjective:
        """The loss that this recipe describes."""
        return CureObjective(
            [TrainingSet(set_spec(text).build(), ratio) for text, ratio in self.sets],
            strategy=self.strategy,
            weights=self.weights,
            alignment=self.alignment,
            align_from=self.align_from,
            regularizer=self.regularizer,
            attack_steps=self.attack_steps,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as in YAML; :func:`recipe_from_mapping` gives the same recipe back."""
        values = asdict(self)
        values["sets"] = [{"set": text, "ratio": ratio} for text, ratio in self.sets]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def recipe_from_mapping(values: Mapping[str, Any]) -> Recipe:
    """A recipe from parsed YAML.

    Raises:
        SpecError: an unknown key (the nearest known one is named), a missing or wrongly typed value.
    """
    known = {field.name: field for field in fields(Recipe)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise SpecError(f"unknown recipe key {key!r}; {hint}")
    converted = {key: _convert(key, str(known[key].type), value) for key, value in values.items()}
    try:
        return Recipe(**converted)
    except TypeError as error:
        raise SpecError(f"incomplete recipe: {error}") from error


def _convert(key: str, kind: str, value: Any) -> Any:
    """``value`` as the field's type, so that ``key=value`` text and YAML mean the same."""
    try:
        if isinstance(value, str) and kind != "str":
            value = yaml.safe_load(value)
        if key == "sets":
            return tuple((str(entry["set"]), float(entry["ratio"])) for entry in value)
        if kind == "bool":
            if not isinstance(value, bool):
                raise TypeError("true or false expected")
            return value
        if kind == "int":
            if int(value) != float(value):
                raise ValueError("a whole number expected")
            return int(value)
        if kind == "float":
            return float(value)
        if kind.startswith("tuple"):
            return tuple(int(v) if "int" in kind else float(v) for v in value)
        return str(value)
    except (TypeError, ValueError, KeyError, OverflowError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"recipe key {key!r} has the unusable value {value!r}: {reason}") from error


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = files("cure_plugin") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by shipped name or YAML file path, with ``overrides`` on top.

    Raises:
        SpecError: no such recipe or file, no mapping in it, or see :func:`recipe_from_mapping`.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text()
        except (OSError, ValueError) as error:
            raise SpecError(f"cannot read recipe {name}: {error}") from error
    elif name in shipped_recipes():
        text = (files("cure_plugin") / "recipes" / f"{name}.yaml").read_text()
    else:
        raise SpecError(f"unknown recipe {name!r}; shipped: {', '.join(shipped_recipes())}, or give a .yaml file")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"recipe {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SpecError(f"recipe {name} must be a mapping of keys to values, got {type(values).__name__}")
    return recipe_from_mapping({**values, **(overrides or {})})
