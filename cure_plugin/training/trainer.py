"""The ready-made loop: natural warm-up, annealing, certified epochs, gradient projection, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cure_plugin.bounds.module import bounded_module
from cure_plugin.checkpoint import load_checkpoint, load_start, net_of, save_checkpoint
from cure_plugin.checks import check_type
from cure_plugin.datasets import ImageData
from cure_plugin.errors import CheckpointError, OutputError, SpecError
from cure_plugin.files import make_folder
from cure_plugin.inputs import all_finite
from cure_plugin.json_files import write_lines
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.progress import progress_bar
from cure_plugin.training.augment import augmented
from cure_plugin.training.epoch import run_epoch
from cure_plugin.training.evaluation import evaluate
from cure_plugin.training.module import ObjectiveModule
from cure_plugin.training.objective import Outcome
from cure_plugin.training.projection import projected_epoch
from cure_plugin.training.recipe import Recipe, recipe_from_mapping
from cure_plugin.training.schedule import smooth_ramp
from cure_plugin.training.world import World
from cure_plugin.zoo import resolved


class Trainer:
    """Trains one net by a :class:`Recipe`; the same seed gives the same net, interrupted or not.

    With gradient projection an epoch is run twice from the same parameters, certified and natural (see
    :func:`projected_epoch`), each with an Adam of its own.

    Args:
        recipe: what to do.
        data: training images.
        folder: where ``checkpoint.pt`` and the log, ``training.jsonl``, are kept after every epoch; an unfinished run
            found there is resumed, a finished one reused. None keeps nothing.
        device: where to train.
        test: images that the log's ``test.`` figures are of (see :func:`evaluate`); none without.

    Raises:
        SpecError: a crop larger than the images, too few images for BatchNorm, or a set or region that does not fit.
        OutputError: the folder cannot be.
        CheckpointError: the folder holds a run of another recipe or data, a damaged checkpoint, or the recipe's
            ``start`` is missing or does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ImageData,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        test: ImageData | None = None,
    ) -> None:
        check_type("recipe", recipe, Recipe, "what load_recipe(name) returns")
        check_type("data", data, ImageData, "what load_data(name, train) returns")
        self.recipe = recipe
        self.data = data
        self.device = torch.device(device)
        self.path = None if folder is None else Path(folder) / "checkpoint.pt"
        self._digest = "" if folder is None else data.digest()
        channels, height, width = data.shape
        if recipe.crop > min(height, width):
            raise SpecError(f"crop {recipe.crop} is larger than the images of {recipe.data}, {height} x {width}")
        shape = (channels, recipe.crop or height, recipe.crop or width)
        if recipe.mean and len(recipe.mean) != channels:
            raise SpecError(f"mean and std need one number per channel ({channels}), got {list(recipe.mean)}")
        if len(data) < recipe.smallest_batch:
            raise SpecError(f"at least {recipe.smallest_batch} images are needed with batch_norm, got {len(data)}")
        self.test = None if test is None else test.centre_crop(*shape[1:])
        self.spec = NetSpec(recipe.net, shape, data.classes, recipe.batch_norm, recipe.mean, recipe.std)
        self.net = build_net(self.spec, torch.Generator().manual_seed(recipe.seed)).to(self.device)
        self.objective = recipe.objective()
        for entry in self.objective.sets:  # refuse what does not fit now, not after the natural epochs
            zeros = torch.zeros(1, *shape)
            variable = entry.perturbation.random_start(zeros, torch.Generator().manual_seed(0))
            entry.kind.try_out(entry.perturbation, zeros, variable)
        self.certified_optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.learning_rate)
        self.natural_optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.learning_rate)
        self.epochs_done = 0
        self.history: list[dict[str, Any]] = []
        if self.path is not None and _there(self.path):
            self._restore(self.path)
        elif recipe.start:
            self.net.load_state_dict(self._start_weights(recipe.start))
        self.bounded = bounded_module(self.net, shape)
        self.world = World.joined()
        self.world.check(self.net)
        self._losses = self.world.wrapped(ObjectiveModule(self.objective, self.bounded, self.net))
        if self.path is not None:
            make_folder(self.path.parent)

    def run(self, progress: bool = False) -> nn.Sequential:
        """Train what is left to train and return the net in eval mode.

        Args:
            progress: show a bar with rate and time left on standard error.

        Raises:
            SpecError: a loss or a weight is no longer finite. OutputError: a checkpoint cannot be written.
        """
        batches = len(self._cut(torch.arange(len(self.data))))
        steps = [batches * (2 if self.recipe.projects(epoch) else 1) for epoch in range(self.recipe.epochs)]
        done = sum(steps[: self.epochs_done])
        with progress_bar(sum(steps), "batch", "train", progress and self.world.first, done) as bar:
            for epoch in range(self.epochs_done, self.recipe.epochs):
                started = time.perf_counter()
                figures = self._epoch(epoch, bar)
                self._refuse_divergence(epoch, figures)
                seconds = time.perf_counter() - started
                if self.test is not None and self.world.first:
                    sets = [entry.perturbation for entry in self.objective.sets]
                    shares = evaluate(self.bounded, self.net, self.test, sets, self.device)
                    figures.update((f"test.{name}", round(share, 6)) for name, share in shares.items())
                self.epochs_done = epoch + 1
                self.history.append({"epoch": self.epochs_done, "seconds": round(seconds, 3), **figures})
                bar.set_postfix(epoch=self.epochs_done, loss=f"{figures['loss']:.3f}", refresh=False)
                self._save()
        return self.net.eval()

    def _refuse_divergence(self, epoch: int, figures: dict[str, float]) -> None:
        """The figures are of both epochs of a projection, and the weights have taken the last step too."""
        values = dict(figures)
        if not all(all_finite(parameter) for parameter in self.net.parameters()):
            values["a weight"] = math.nan
        for name, value in values.items():
            if not math.isfinite(value):
                raise SpecError(
                    f"{name} became {value} in epoch {epoch + 1}, which is not kept; "
                    "lower learning_rate or raise ramp_epochs"
                )

    # -- one epoch -----------------------------------------------------------------------------

    def _epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        if epoch < self.recipe.natural_epochs:
            return self._natural(epoch, bar, self.certified_optimizer)
        if not self.recipe.projects(epoch):
            return self._certified(epoch, bar)
        figures, natural_figures = projected_epoch(
            self.net,
            lambda: self._certified(epoch, bar),
            lambda: self._natural(epoch, bar, self.natural_optimizer),
            self.recipe.gradient_projection,
        )
        return {**figures, "natural_loss": natural_figures["loss"]}

    def _natural(self, epoch: int, bar: tqdm, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        batches = self._batches(epoch, bar, optimizer)
        recipe = self.recipe
        loss = partial(self._losses, scale=None)
        figures = run_epoch(self.net, batches, loss, optimizer, recipe.l1_penalty, recipe.clip)
        return {**figures, "learning_rate": self._rate(epoch)}

    def _certified(self, epoch: int, bar: tqdm) -> dict[str, float]:
        recipe = self.recipe
        self.objective.restart(self.bounded)
        generator = torch.Generator(self.device).manual_seed(recipe.seed * 1_000_003 + epoch)
        total = len(self._cut(torch.arange(len(self.data))))
        steps = iter(range(total))

        def loss(x: Tensor, y: Tensor) -> Outcome:
            step = next(steps)
            elapsed = epoch - recipe.natural_epochs + step / total
            scale = smooth_ramp(elapsed / recipe.ramp_epochs) if recipe.ramp_epochs else 1.0
            outcome = self._losses(x, y, scale, generator, step)
            return replace(outcome, figures={**outcome.figures, "scale": scale})

        optimizer = self.certified_optimizer
        batches = self._batches(epoch, bar, optimizer)
        figures = run_epoch(self.net, batches, loss, optimizer, recipe.l1_penalty, recipe.clip)
        return {**figures, "learning_rate": self._rate(epoch)}

    def _rate(self, elapsed: float) -> float:
        """The learning rate after so many epochs."""
        recipe = self.recipe
        rate = recipe.learning_rate * recipe.decay ** sum(elapsed >= milestone for milestone in recipe.milestones)
        left = (recipe.epochs - elapsed) / recipe.cooldown_epochs if recipe.cooldown_epochs else 1.0
        return rate * min(1.0, left)

    def _batches(self, epoch: int, bar: tqdm, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches: order and augmentation depend on nothing but the seed and the epoch; sets the rate."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        cut = self._cut(torch.randperm(len(self.data), generator=generator))
        for number, chosen in enumerate(cut):
            for group in optimizer.param_groups:
                group["lr"] = self._rate(epoch + number / len(cut))
            x, y = self.data.batch(chosen, self.device)
            yield augmented(x, recipe.flip, recipe.crop, recipe.pad, generator), y
            bar.update()

    def _cut(self, order: Tensor) -> list[Tensor]:
        """``order`` cut into batches; a last one too small for BatchNorm in every part joins its predecessor."""
        batches = list(order.split(self.recipe.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * len(self.recipe.sets):
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    # -- state ---------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.path is None or not self.world.first:
            return
        # before the checkpoint: a run killed between the two does the epoch again, and writes the same
        write_lines(self.path.with_name("training.jsonl"), self.history)
        save_checkpoint(
            self.path,
            self.spec,
            self.net,
            {
                "recipe": self.recipe.to_mapping(),
                "data": self._digest,
                "epochs_done": self.epochs_done,
                "history": self.history,
                "certified_optimizer": self.certified_optimizer.state_dict(),
                "natural_optimizer": self.natural_optimizer.state_dict(),
            },
        )

    def _start_weights(self, start: str) -> dict[str, Tensor]:
        path = resolved(start)
        if not _there(path) or not path.is_file():
            raise CheckpointError(
                f"start {start!r} is no file; this recipe goes on from a trained net, so train one and give "
                "start=PATH of its checkpoint or state_dict, or start=zoo:NAME (cure zoo lists them)"
            )
        return load_start(path, self.spec)

    def _restore(self, path: Path) -> None:
        payload = load_checkpoint(path)
        if not _same(payload.get("recipe"), self.recipe):
            raise CheckpointError(f"{path} belongs to another recipe; choose another output folder or delete it")
        if payload.get("data", self._digest) != self._digest:
            raise CheckpointError(f"{path} was trained on other images; choose another output folder or delete it")
        _, net = net_of(payload, str(path))
        self.net.load_state_dict(net.state_dict())
        try:
            self.certified_optimizer.load_state_dict(payload["certified_optimizer"])
            self.natural_optimizer.load_state_dict(payload["natural_optimizer"])
            for optimizer in (self.certified_optimizer, self.natural_optimizer):
                if any(state["exp_avg"].shape != weight.shape for weight, state in optimizer.state.items()):
                    raise ValueError("moments of other shapes than the weights")
            self.epochs_done, self.history = int(payload["epochs_done"]), list(payload["history"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} lacks the state to resume from: {error}; delete it to start anew") from error


def _there(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        OutputError: no file can be there, as of a name that is too long.
    """
    try:
        return path.exists()
    except OSError as error:
        raise OutputError(f"cannot use {path}: {error.strerror}; choose another place") from error


def _same(stored: Any, recipe: Recipe) -> bool:
    """Whether a checkpoint's recipe is this one; keys that it does not know yet have their defaults."""
    try:
        return recipe_from_mapping(stored) == recipe
    except SpecError:
        return False
