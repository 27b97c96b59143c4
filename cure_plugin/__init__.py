"""cure_plugin: multi-norm perturbation sets, certified training and export for auto_LiRPA."""

from cure_plugin.compat import import_auto_lirpa

import_auto_lirpa()

from cure_plugin.bounds.hooks import install_all as _install_hooks  # noqa: E402
from cure_plugin.bounds.pad import install as _install_pad  # noqa: E402
from cure_plugin.sets import (  # noqa: E402
    PerturbationGeometric,
    PerturbationL0,
    PerturbationLpBall,
    PerturbationPatch,
    PerturbationSet,
    PerturbationUnion,
    perturbation_from_spec,
    register_perturbation,
)

_install_hooks()
_install_pad()

__version__ = "0.1.0"

__all__ = [
    "PerturbationGeometric",
    "PerturbationL0",
    "PerturbationLpBall",
    "PerturbationPatch",
    "PerturbationSet",
    "PerturbationUnion",
    "perturbation_from_spec",
    "register_perturbation",
]
