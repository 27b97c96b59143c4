"""``cure train``."""

from __future__ import annotations

import argparse

from cure_plugin.cli.options import check_device, read_overrides
from cure_plugin.datasets import load_data
from cure_plugin.training import Trainer, joined_processes, load_recipe

_LOGGED_IMAGES = 500
"""Test images that the log's figures are of."""


def train(options: argparse.Namespace) -> None:
    """Train by a recipe, resuming an earlier run in the same folder; together where torchrun starts several processes.

    Raises:
        SpecError: an override that is no key=value, a device that is not there, or a bad recipe.
    """
    check_device(options.device)
    recipe = load_recipe(options.recipe, read_overrides(options.overrides))
    test = load_data(recipe.data, False, options.data)
    test = test.first(min(_LOGGED_IMAGES, len(test)))
    with joined_processes(options.device) as device:
        trainer = Trainer(recipe, load_data(recipe.data, True, options.data), options.out, device, test)
        if trainer.epochs_done and trainer.world.first:
            print(f"found {trainer.epochs_done} of {recipe.epochs} epochs in {options.out}")
        trainer.run(progress=True)
    if trainer.world.first:
        print(f"trained: {options.out / 'checkpoint.pt'}")
