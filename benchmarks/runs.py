"""Train the nets that benchmarks measure, each after the one that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cure_plugin.datasets import load_data
from cure_plugin.training import Trainer, load_recipe


def trained(
    name: str,
    overrides: dict[str, Any],
    folder: Callable[[str], Path],
    data: Path | None,
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
        data: data root, None for ``CURE_DATA``.
        device: where to train.
        test_images: test images of the log's figures, None for no such figures.
        progress: bars on standard error.
    """
    recipe = load_recipe(name, overrides)
    if recipe.start and "start" not in overrides:
        start, about = recipe.start, {key: overrides[key] for key in ("seed",) if key in overrides}
        trained(start, about, folder, data, device=device, test_images=test_images, progress=progress)
        checkpoint = folder(start) / "checkpoint.pt"
        recipe = load_recipe(name, {**overrides, "start": str(checkpoint)})
    test = None if test_images is None else load_data(recipe.data, False, data).first(test_images)
    trainer = Trainer(recipe, load_data(recipe.data, True, data), folder(name), device, test)
    trainer.run(progress=progress)
    return trainer
