"""Perturbation sets for auto_LiRPA's ``BoundedTensor``, and their specs."""

from cure_plugin.compat import import_auto_lirpa

import_auto_lirpa()  # says what to install where it is missing

from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.box import PerturbationBox
from cure_plugin.sets.geometric import PerturbationGeometric
from cure_plugin.sets.lp import PerturbationLpBall
from cure_plugin.sets.patch import PerturbationL0, PerturbationPatch
from cure_plugin.sets.region import Region
from cure_plugin.sets.registry import kinds, register_perturbation
from cure_plugin.sets.spec import (
    LpBallSpec,
    NamedSpec,
    SetSpec,
    UnionSpec,
    parse_number,
    perturbation_from_spec,
    read_sets,
    set_spec,
)
from cure_plugin.sets.union import PerturbationUnion

__all__ = [
    "LpBallSpec",
    "NamedSpec",
    "PerturbationBox",
    "PerturbationGeometric",
    "PerturbationL0",
    "PerturbationLpBall",
    "PerturbationPatch",
    "PerturbationSet",
    "PerturbationUnion",
    "Region",
    "SetSpec",
    "UnionSpec",
    "kinds",
    "parse_number",
    "perturbation_from_spec",
    "read_sets",
    "register_perturbation",
    "set_spec",
]
