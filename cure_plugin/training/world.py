"""Several processes that train as one: each works on its share of a batch, and all know the whole batch's losses.

Every process is given the whole batch and draws the same random numbers, so that a step means the same for any number
of processes. Each computes the loss of the whole batch from what the others have gathered; the mean of their gradients,
which ``DistributedDataParallel`` takes, is then its gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.errors import SpecError, first_line
from cure_plugin.sets.region import Region


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this one's number. size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def joined() -> World:
        """Those of ``torch.distributed``'s default group; this process alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return World()
        return World(dist.get_rank(), dist.get_world_size())

    def share(self, count: int) -> Share:
        """What this process takes of ``count`` samples."""
        return Share(self, count)

    def any(self, flag: bool, like: Tensor) -> bool:
        """Whether it is so for any process; ``like``: on the device to talk over."""
        if self.size == 1:
            return flag
        told = like.new_tensor(float(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wrapped(self, module: nn.Module) -> nn.Module:
        """``module`` for a training loop: its gradients are the mean over all processes."""
        return module if self.size == 1 else nn.parallel.DistributedDataParallel(module)

    def check(self, net: nn.Module) -> None:
        """Refuse nets that mean something else where a batch is shared out.

        Raises:
            SpecError: BatchNorm that normalises by the batch.
        """
        if self.size > 1 and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules()):
            raise SpecError(
                f"BatchNorm would normalise by each of {self.size} processes' part of a batch, and the net depend on "
                "their number; train it with one process, or without (batch_norm: false)"
            )


ALONE = World()
"""One process."""


def own_device(device: str) -> str:
    """Of ``cuda`` this process's GPU, where ``torchrun`` has started several."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


@contextmanager
def joined_processes(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` has started, for a while; nothing to do in a process started otherwise.

    Args:
        device: ``cpu`` (they talk by gloo) or ``cuda`` (by nccl).

    Yields:
        The device of this process: its own GPU.

    Raises:
        SpecError: they cannot talk to each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    own = own_device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    except (RuntimeError, ValueError, AttributeError) as error:
        raise SpecError(f"the processes of torchrun cannot talk to each other: {first_line(error)}") from error
    try:
        yield own
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Share:
    """One process's part of ``count`` samples, as equal as can be; of fewer samples than processes, some get none.

    These work on the first sample as a stand-in, so that all processes go the same way; what comes of it is dropped.
    """

    world: World
    count: int

    def size(self, rank: int) -> int:
        """How many samples that process has."""
        return self.count // self.world.size + (rank < self.count % self.world.size)

    def of(self, x: Tensor) -> Tensor:
        """This process's rows of ``x`` (count, ...), or a stand-in."""
        return x if self.world.size == 1 else x[self._index(x.device)]

    def of_region(self, region: Region) -> Region:
        """The same of images and the set around them."""
        return region if self.world.size == 1 else region.select(self._index(region.x.device))

    def all(self, own: Tensor) -> Tensor:
        """All ``count`` rows, of this process's ``own``; gradients reach every process's."""
        if self.world.size == 1:
            return own
        most = self.size(0)
        kept = self._kept(own)
        gathered = _Gathered.apply(F.pad(kept, (0, 0) * (kept.ndim - 1) + (0, most - len(kept))), self.world)
        return torch.cat([gathered[rank, : self.size(rank)] for rank in range(self.world.size)])

    def sum(self, own: Tensor) -> Tensor:
        """The sum of a tensor with a row a sample, over all samples."""
        return own.sum() if self.world.size == 1 else _Summed.apply(self._kept(own).sum())

    def mean(self, own: Tensor) -> Tensor:
        """The mean likewise."""
        return own.mean() if self.world.size == 1 else self.sum(own) / (own[:1].numel() * self.count)

    def any(self, own: Tensor) -> bool:
        """Whether a tensor of bools with a row a sample holds one that is true."""
        return self.world.any(bool(self._kept(own).any()), torch.zeros((), device=own.device))

    def _index(self, device: torch.device) -> Tensor:
        start = sum(map(self.size, range(self.world.rank)))
        own = range(start, start + self.size(self.world.rank))
        return torch.tensor([*own] or [0], device=device)

    def _kept(self, own: Tensor) -> Tensor:
        """``own`` without a stand-in."""
        return own if self.world.size == 1 else own[: self.size(self.world.rank)]


class _Gathered(torch.autograd.Function):
    """The tensors (n, ...) of all processes, (size, n, ...)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, world: World) -> Tensor:
        ctx.world = world
        parts = [torch.empty_like(own) for _ in range(world.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.world.rank], None


class _Summed(torch.autograd.Function):
    """The sum of all processes' tensors."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient
