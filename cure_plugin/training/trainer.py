"""The ready-made loop: natural warm-up, annealing, certified epochs, gradient projection, resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cure_plugin.bounds.module import bounded_module
from cure_plugin.checkpoint import load_checkpoint, net_of, save_checkpoint
from cure_plugin.datasets import ImageData
from cure_plugin.errors import CheckpointError
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.training.projection import project_update
from cure_plugin.training.recipe import Recipe
from cure_plugin.training.schedule import smooth_ramp


class Trainer:
    """Trains one net by a :class:`Recipe`; the same seed gives the same net, interrupted or not.

    Gradient projection: after annealing, each epoch is run twice from the same parameters, certified and
    natural. The two have an optimiser each, whose moments carry on from epoch to epoch on their own
    side; running statistics of BatchNorm are those of the certified epoch.

    Args:
        recipe: what to do.
        data: training images.
        folder: where ``checkpoint.pt`` is kept after every epoch; an unfinished run found there is
            resumed, a finished one reused. None keeps nothing.
        device: where to train.

    Raises:
        CheckpointError: the folder holds a run of another recipe, or a damaged checkpoint.
    """

    def __init__(
        self, recipe: Recipe, data: ImageData, folder: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.device = torch.device(device)
        self.path = None if folder is None else Path(folder) / "checkpoint.pt"
        self.spec = NetSpec(recipe.net, data.shape, data.classes, recipe.batch_norm)
        self.net = build_net(self.spec, torch.Generator().manual_seed(recipe.seed)).to(self.device)
        self.objective = recipe.objective()
        self.certified_optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.learning_rate)
        self.natural_optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.learning_rate)
        self.epochs_done = 0
        self.history: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self._restore(self.path)
        self.bounded = bounded_module(self.net, data.shape)

    def run(self, progress: bool = False) -> nn.Sequential:
        """Train what is left to train and return the net in eval mode.

        Args:
            progress: show a bar with rate and time left on standard error.

        Raises:
            OutputError: a checkpoint cannot be written.
        """
        batches = len(self._batches(torch.arange(len(self.data))))
        steps = [batches * (2 if self._projects(epoch) else 1) for epoch in range(self.recipe.epochs)]
        done = sum(steps[: self.epochs_done])
        with tqdm(total=sum(steps), initial=done, disable=not progress, unit="batch", desc="train") as bar:
            for epoch in range(self.epochs_done, self.recipe.epochs):
                started = time.perf_counter()
                figures = self._epoch(epoch, bar)
                self.epochs_done = epoch + 1
                seconds = time.perf_counter() - started
                self.history.append({"epoch": self.epochs_done, "seconds": round(seconds, 3), **figures})
                bar.set_postfix(epoch=self.epochs_done, loss=f"{figures['loss']:.3f}")
                self._save()
        return self.net.eval()

    # -- one epoch -----------------------------------------------------------------------------

    def _batches(self, order: Tensor) -> list[Tensor]:
        """``order`` cut into batches; a last one too small for BatchNorm in every part joins its predecessor."""
        batches = list(order.split(self.recipe.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * len(self.recipe.sets):
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def _projects(self, epoch: int) -> bool:
        """Whether gradient projection applies: certified epochs after annealing."""
        annealed = self.recipe.natural_epochs + self.recipe.ramp_epochs
        return self.recipe.gradient_projection > 0 and epoch >= annealed

    def _epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        if epoch < self.recipe.natural_epochs:
            return self._pass(epoch, bar, certified=False, optimizer=self.certified_optimizer)
        if not self._projects(epoch):
            return self._pass(epoch, bar, certified=True, optimizer=self.certified_optimizer)
        start = self._parameters()
        figures = self._pass(epoch, bar, certified=True, optimizer=self.certified_optimizer)
        certified = self._parameters()
        buffers = {name: value.clone() for name, value in self.net.named_buffers()}
        self._set_parameters(start)
        natural_figures = self._pass(epoch, bar, certified=False, optimizer=self.natural_optimizer)
        weight = self.recipe.gradient_projection
        self._set_parameters(project_update(start, certified, self._parameters(), weight))
        with torch.no_grad():
            for name, value in self.net.named_buffers():
                value.copy_(buffers[name])
        return {**figures, "natural_loss": natural_figures["loss"]}

    def _pass(self, epoch: int, bar: tqdm, certified: bool, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One pass over the data; returns the means of the figures, weighted by batch size."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        attack_generator = torch.Generator(self.device).manual_seed(recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data), generator=generator)
        rate = recipe.learning_rate * recipe.decay ** sum(epoch >= milestone for milestone in recipe.milestones)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.net.train()
        totals: dict[str, float] = {}
        batches = self._batches(order)
        for index, chosen in enumerate(batches):
            x, y = self.data.batch(chosen, self.device)
            if certified:
                elapsed = epoch - recipe.natural_epochs + index / len(batches)
                scale = smooth_ramp(elapsed / recipe.ramp_epochs) if recipe.ramp_epochs else 1.0
                outcome = self.objective(self.bounded, self.net, x, y, scale, attack_generator)
                loss, figures = outcome.loss, {**outcome.figures, "scale": scale}
            else:
                loss, figures = F.cross_entropy(self.net(x), y), {}
            if recipe.l1_penalty:
                loss = loss + recipe.l1_penalty * torch.stack([p.abs().sum() for p in self.net.parameters()]).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
            optimizer.step()
            figures["loss"] = float(loss.detach())
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value * len(chosen) / len(self.data)
            bar.update()
        return {**totals, "learning_rate": rate}

    # -- state ---------------------------------------------------------------------------------

    def _parameters(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.net.named_parameters()}

    def _set_parameters(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(values[name])

    def _save(self) -> None:
        if self.path is None:
            return
        save_checkpoint(
            self.path,
            self.spec,
            self.net,
            {
                "recipe": self.recipe.to_mapping(),
                "epochs_done": self.epochs_done,
                "history": self.history,
                "certified_optimizer": self.certified_optimizer.state_dict(),
                "natural_optimizer": self.natural_optimizer.state_dict(),
            },
        )

    def _restore(self, path: Path) -> None:
        payload = load_checkpoint(path)
        if payload.get("recipe") != self.recipe.to_mapping():
            raise CheckpointError(f"{path} belongs to another recipe; choose another output folder or delete it")
        _, net = net_of(payload, str(path))
        self.net.load_state_dict(net.state_dict())
        try:
            self.certified_optimizer.load_state_dict(payload["certified_optimizer"])
            self.natural_optimizer.load_state_dict(payload["natural_optimizer"])
            self.epochs_done, self.history = int(payload["epochs_done"]), list(payload["history"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} lacks the state to resume from: {error}; delete it to start anew") from error
