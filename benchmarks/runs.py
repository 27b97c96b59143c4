"""Train the nets that benchmarks measure, each after the one that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cure_plugin.certification import Certifier, Summary, certify_dataset, summarize
from cure_plugin.certification.cascade import CASCADE, timed
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.nets import NetSpec
from cure_plugin.sets import set_spec
from cure_plugin.training import Trainer, load_recipe

HELD_OUT = 5000
"""Last training images that tries are looked at on, and not trained on; a tenth of fewer than ten times as many."""

SECONDS = 5
"""Of branch and bound, an image and set."""

Splits = Callable[[str], tuple[ImageData, ImageData]]
"""Name of a data set -> (images to train on, images to look at)."""


def test_split(root: Path | None) -> Splits:
    """Training and test images; ``root``: None for ``CURE_DATA``."""
    return lambda name: (load_data(name, True, root), load_data(name, False, root))


def validation_split(root: Path | None) -> Splits:
    """Training images but the last, and those."""

    def split(name: str) -> tuple[ImageData, ImageData]:
        data = load_data(name, True, root)
        count = min(HELD_OUT, len(data) // 10)
        return data.first(len(data) - count), ImageData(data.images[-count:], data.labels[-count:], data.classes)

    return split


def trained(
    name: str,
    overrides: dict[str, Any],
    folder: Callable[[str], Path],
    splits: Splits,
    *,
    device: torch.device | str = "cpu",
    test_images: int | None = None,
    progress: bool = True,
) -> Trainer:
    """A finished run of the recipe ``name``; what is trained already is not trained again.

    Args:
        name: ``SETTING/METHOD``.
        overrides: keys of the recipe to change; of a net that the recipe starts from only the ``seed``.
        folder: where a recipe of this name is trained, also the one that this one starts from.
        splits: where its images come from.
        device: where to train.
        test_images: of the images to look at, for the log's figures; None for no such figures.
        progress: bars on standard error.
    """
    recipe = load_recipe(name, overrides)
    if recipe.start and "start" not in overrides:
        start, about = recipe.start, {key: overrides[key] for key in ("seed",) if key in overrides}
        trained(start, about, folder, splits, device=device, test_images=test_images, progress=progress)
        checkpoint = folder(start) / "checkpoint.pt"
        recipe = load_recipe(name, {**overrides, "start": str(checkpoint)})
    images, test = splits(recipe.data)
    trainer = Trainer(recipe, images, folder(name), device, None if test_images is None else test.first(test_images))
    trainer.run(progress=progress)
    return trainer


def certified(
    net: nn.Module, spec: NetSpec, images: ImageData, sets: Sequence[str], path: Path, label: str, progress: bool = True
) -> Summary:
    """What the default cascade says of a net on ``images``; verdicts go to ``path``, which a later run goes on with."""
    methods = timed(CASCADE, SECONDS)
    certifier = Certifier(net, spec.input_shape, methods, batch_size=100)  # few of a batch are left to later stages
    specs = [set_spec(text) for text in sets]
    return summarize(certify_dataset(certifier, images, specs, path, progress=progress, label=f"certify {label}"))
