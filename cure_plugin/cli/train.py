"""``cure train``."""

from __future__ import annotations

import argparse
import json

from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.files import write_text
from cure_plugin.training import Trainer, load_recipe


def train(options: argparse.Namespace) -> None:
    """Train by a recipe, resuming an earlier run in the same folder."""
    overrides = {}
    for text in options.overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise SpecError(f"an override is written key=value, got {text!r}")
        overrides[key] = value
    recipe = load_recipe(options.recipe, overrides)
    trainer = Trainer(recipe, load_data(recipe.data, True, options.data), options.out)
    if trainer.epochs_done:
        print(f"found {trainer.epochs_done} of {recipe.epochs} epochs in {options.out}")
    trainer.run(progress=True)
    write_text(options.out / "training.jsonl", "".join(json.dumps(entry) + "\n" for entry in trainer.history))
    print(f"trained: {options.out / 'checkpoint.pt'}")
