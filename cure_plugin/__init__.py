"""cure_plugin: multi-norm perturbation sets, certified training and export for auto_LiRPA.

Importing it mends auto_LiRPA 0.3 and puts this package's hooks into auto_LiRPA, where that and torch are installed. The
names below are imported when they are asked for; where either is missing, they say how to install it. The benchmark
generators of :mod:`cure_plugin.vnncomp` need neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from cure_plugin.compat import import_auto_lirpa, missing_package

if TYPE_CHECKING:
    from cure_plugin.bounds.module import bounded_module
    from cure_plugin.certification import Certifier, Summary, certify_dataset, summarize
    from cure_plugin.checkpoint import load_net
    from cure_plugin.datasets import ImageData, load_data
    from cure_plugin.export import encode, export_instances, export_onnx, onnx_model
    from cure_plugin.nets import NetSpec, Normalize, build_net
    from cure_plugin.sets import (
        PerturbationBox,
        PerturbationGeometric,
        PerturbationL0,
        PerturbationLpBall,
        PerturbationPatch,
        PerturbationSet,
        PerturbationUnion,
        perturbation_from_spec,
        register_perturbation,
        set_spec,
    )
    from cure_plugin.training import (
        Adversarial,
        Blended,
        CcIbp,
        CrownIbp,
        CureObjective,
        Ibp,
        Joint,
        LipschitzMargin,
        Max,
        MtlIbp,
        RandomPartition,
        Sabr,
        SabrBox,
        Single,
        Trainer,
        TrainingSet,
        load_recipe,
        projected_epoch,
        smooth_ramp,
    )

if missing_package() is None:
    import_auto_lirpa()
    import_module("cure_plugin.bounds.hooks").install_all()
    import_module("cure_plugin.bounds.pad").install()

__version__ = "0.2.0"

__all__ = [
    "Adversarial",
    "Blended",
    "CcIbp",
    "Certifier",
    "CrownIbp",
    "CureObjective",
    "Ibp",
    "ImageData",
    "Joint",
    "LipschitzMargin",
    "Max",
    "MtlIbp",
    "NetSpec",
    "Normalize",
    "PerturbationBox",
    "PerturbationGeometric",
    "PerturbationL0",
    "PerturbationLpBall",
    "PerturbationPatch",
    "PerturbationSet",
    "PerturbationUnion",
    "RandomPartition",
    "Sabr",
    "SabrBox",
    "Single",
    "Summary",
    "Trainer",
    "TrainingSet",
    "bounded_module",
    "build_net",
    "certify_dataset",
    "encode",
    "export_instances",
    "export_onnx",
    "load_data",
    "load_net",
    "load_recipe",
    "onnx_model",
    "perturbation_from_spec",
    "projected_epoch",
    "register_perturbation",
    "set_spec",
    "smooth_ramp",
    "summarize",
]

_NAMES = {
    "bounds.module": ["bounded_module"],
    "certification": ["Certifier", "Summary", "certify_dataset", "summarize"],
    "checkpoint": ["load_net"],
    "datasets": ["ImageData", "load_data"],
    "export": ["encode", "export_instances", "export_onnx", "onnx_model"],
    "nets": ["NetSpec", "Normalize", "build_net"],
    "sets": [
        "PerturbationBox",
        "PerturbationGeometric",
        "PerturbationL0",
        "PerturbationLpBall",
        "PerturbationPatch",
        "PerturbationSet",
        "PerturbationUnion",
        "perturbation_from_spec",
        "register_perturbation",
        "set_spec",
    ],
    "training": [
        "Adversarial",
        "Blended",
        "CcIbp",
        "CrownIbp",
        "CureObjective",
        "Ibp",
        "Joint",
        "LipschitzMargin",
        "Max",
        "MtlIbp",
        "RandomPartition",
        "Sabr",
        "SabrBox",
        "Single",
        "Trainer",
        "TrainingSet",
        "load_recipe",
        "projected_epoch",
        "smooth_ramp",
    ],
}
"""Module -> what is imported from it when it is asked for."""

_MODULE_OF = {name: f"cure_plugin.{module}" for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:  # type checkers read the imports above, and so find names that do not exist

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_auto_lirpa()  # says what to install where it is missing
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
