"""CURE's training hooks: functions and small objects for any loop, and one ready-made loop over them."""

from cure_plugin.compat import import_auto_lirpa

import_auto_lirpa()  # says what to install where it is missing

from cure_plugin.training.alignment import bound_alignment
from cure_plugin.training.augment import augmented
from cure_plugin.training.batch_norm import batch_statistics
from cure_plugin.training.epoch import natural_loss, run_epoch
from cure_plugin.training.evaluation import evaluate
from cure_plugin.training.loss import (
    LOSSES,
    Adversarial,
    Batch,
    Blended,
    CcIbp,
    CrownIbp,
    Ibp,
    LipschitzMargin,
    Loss,
    MtlIbp,
    Sabr,
    SabrBox,
)
from cure_plugin.training.losses import (
    SetLoss,
    adversarial_loss,
    cc_ibp_loss,
    crown_ibp_loss,
    ibp_loss,
    lipschitz_loss,
    mtl_ibp_loss,
    sabr_box_loss,
    sabr_loss,
)
from cure_plugin.training.module import ObjectiveModule
from cure_plugin.training.objective import CureObjective, Outcome, TrainingSet
from cure_plugin.training.projection import project_update, projected_epoch
from cure_plugin.training.recipe import Recipe, SetRecipe, load_recipe
from cure_plugin.training.regularizer import warmup_regularizer
from cure_plugin.training.schedule import smooth_ramp
from cure_plugin.training.shrinking import relu_shrinking
from cure_plugin.training.strategies import (
    STRATEGIES,
    Joint,
    Max,
    RandomPartition,
    Single,
    Strategy,
    joint,
    maximum,
    random_partition,
)
from cure_plugin.training.trainer import Trainer
from cure_plugin.training.world import World, joined_processes

__all__ = [
    "LOSSES",
    "STRATEGIES",
    "Adversarial",
    "Batch",
    "Blended",
    "CcIbp",
    "CrownIbp",
    "CureObjective",
    "Ibp",
    "Joint",
    "LipschitzMargin",
    "Loss",
    "Max",
    "MtlIbp",
    "ObjectiveModule",
    "Outcome",
    "RandomPartition",
    "Recipe",
    "Sabr",
    "SabrBox",
    "SetLoss",
    "SetRecipe",
    "Single",
    "Strategy",
    "Trainer",
    "TrainingSet",
    "World",
    "adversarial_loss",
    "augmented",
    "batch_statistics",
    "bound_alignment",
    "cc_ibp_loss",
    "crown_ibp_loss",
    "evaluate",
    "ibp_loss",
    "joined_processes",
    "joint",
    "lipschitz_loss",
    "load_recipe",
    "maximum",
    "mtl_ibp_loss",
    "natural_loss",
    "project_update",
    "projected_epoch",
    "random_partition",
    "relu_shrinking",
    "run_epoch",
    "sabr_box_loss",
    "sabr_loss",
    "smooth_ramp",
    "warmup_regularizer",
]
