"""Perturbation sets for auto_LiRPA's ``BoundedTensor``, and their specs."""

from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.lp import PerturbationLpBall
from cure_plugin.sets.spec import LpBallSpec, SetSpec, UnionSpec, parse_number, set_spec
from cure_plugin.sets.union import PerturbationUnion

__all__ = [
    "LpBallSpec",
    "PerturbationLpBall",
    "PerturbationSet",
    "PerturbationUnion",
    "SetSpec",
    "UnionSpec",
    "parse_number",
    "set_spec",
]
