"""Attacks inside any perturbation set: projected gradients, and the search for counterexamples."""

from cure_plugin.attacks.gradient import (
    Job,
    Objective,
    Pgd,
    cross_entropy,
    pgd,
    pgd_variable,
    pgd_variables,
    worst_margin_loss,
)
from cure_plugin.attacks.search import find_counterexample

__all__ = [
    "Job",
    "Objective",
    "Pgd",
    "cross_entropy",
    "find_counterexample",
    "pgd",
    "pgd_variable",
    "pgd_variables",
    "worst_margin_loss",
]
