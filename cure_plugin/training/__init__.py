"""CURE's training hooks: functions and small objects for any loop, and one ready-made loop over them."""

from cure_plugin.training.alignment import bound_alignment
from cure_plugin.training.objective import CureObjective, Outcome, TrainingSet
from cure_plugin.training.projection import project_update
from cure_plugin.training.recipe import Recipe, load_recipe
from cure_plugin.training.regularizer import warmup_regularizer
from cure_plugin.training.schedule import smooth_ramp
from cure_plugin.training.strategies import joint, maximum, random_partition
from cure_plugin.training.trainer import Trainer

__all__ = [
    "CureObjective",
    "Outcome",
    "Recipe",
    "Trainer",
    "TrainingSet",
    "bound_alignment",
    "joint",
    "load_recipe",
    "maximum",
    "project_update",
    "random_partition",
    "smooth_ramp",
    "warmup_regularizer",
]
