"""Steps of other people's training code on our nets, from folders with their sources: SABR's own code, and CTRAIN.

Both train for linf alone. What they import has to be installed (CTRAIN: auto_LiRPA 0.6 or later, scikit-learn).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.bounds.module import bounded_module
from cure_plugin.errors import DataError

Run = Callable[[], None]


def sabr_step(
    folder: Path, net: nn.Sequential, x: Tensor, y: Tensor, eps: float, ratio: float, attack_steps: int
) -> Run:
    """A step as in SABR's ``train.py``: natural forward pass, attack, box, backward pass, Adam."""
    layers, wrappers, attack = (
        _module(folder, f"src.{name}") for name in ("AIDomains.abstract_layers", "AIDomains.wrappers", "adv_attack")
    )
    abstract = layers.Sequential.from_concrete_network(nn.Sequential(net), tuple(x.shape[1:]))
    abstract.set_dim(x)
    abstract.train()
    optimizer = torch.optim.Adam(abstract.parameters(), lr=5e-4)

    def run() -> None:
        abstract.reset_bounds()
        abstract(x)
        abstract.eval()
        options = {"n_steps": attack_steps, "step_size": 0.5, "ODI_num_steps": 0, "loss_function": "CE"}
        _, box = attack.adv_whitebox(abstract, x, y, ratio * eps, eps, **options)
        abstract.train()
        logits, labels = wrappers.propagate_abs(abstract, "box", box, y)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()

    return run


def ctrain_step(
    folder: Path, net: nn.Sequential, x: Tensor, y: Tensor, eps: float, ratio: float, attack_steps: int
) -> Run:
    """A step with CTRAIN's SABR loss twice, as one over two sets would ask of it."""
    loss = _module(folder, "CTRAIN.train.certified.losses").get_sabr_loss
    bounded = bounded_module(net, tuple(x.shape[1:]))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)
    lowest, highest = torch.zeros(1), torch.ones(1)
    options: dict[str, Any] = {"data_min": lowest, "data_max": highest, "device": "cpu", "pgd_steps": attack_steps}

    def run() -> None:
        optimizer.zero_grad()
        for _ in range(2):
            given = (bounded, net, x, y, eps, ratio, nn.CrossEntropyLoss(reduction="none"))
            loss(*given, pgd_early_stopping=False, **options)[0].backward()
        optimizer.step()

    return run


def _module(folder: Path, name: str) -> Any:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the one with the sources of {name.partition('.')[0]}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"cannot import {name} from {folder}: {error}") from error
