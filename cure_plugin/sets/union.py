"""The union of several sets: one bound that holds for every member."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from cure_plugin.checks import check_type
from cure_plugin.errors import SpecError
from cure_plugin.sets.base import PerturbationSet
from cure_plugin.sets.rows import Rows


class PerturbationUnion(PerturbationSet):
    """All points that lie in at least one member set around x.

    Args:
        members: at least one set over the same input.

    Raises:
        SpecError: no member, or a member that is no :class:`PerturbationSet`.
    """

    def __init__(self, members: Sequence[PerturbationSet]) -> None:
        super().__init__()
        check_type("members", members, (list, tuple), "a list of cure_plugin sets")
        if not members:
            raise SpecError("a union needs at least one member set, got none")
        for member in members:
            if not isinstance(member, PerturbationSet):
                raise SpecError(f"a union's members must be cure_plugin sets, got {type(member).__name__}")
        self.members = tuple(members)
        self.name = "union(" + ",".join(member.name for member in self.members) + ")"

    def set_eps(self, eps: float | Tensor) -> None:
        """Refused: the members have different radii."""
        raise SpecError(f"a union has no single eps (asked for {eps!r}); set the eps of its members")

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lowers, uppers = zip(*(member.box(x) for member in self.members), strict=True)
        return reduce(torch.minimum, lowers), reduce(torch.maximum, uppers)

    def check(self, x: Tensor) -> None:
        for member in self.members:
            member.check(x)

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        return reduce(torch.minimum, [member.deviation(x, rows) for member in self.members])

    def radii(self, x: Tensor) -> tuple[Tensor, Tensor]:
        l1, l2 = zip(*(member.radii(x) for member in self.members), strict=True)
        return reduce(torch.maximum, l1), reduce(torch.maximum, l2)

    def refines_first_layer(self) -> bool:
        return any(member.refines_first_layer() for member in self.members)

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        """The nearest, per sample, of the members' projections."""
        candidates = torch.stack([member.project(x, point) for member in self.members])
        distance = (candidates - point).flatten(2).norm(dim=2)
        return _pick_per_sample(candidates, distance.argmin(0))

    def contains(self, x: Tensor, point: Tensor, tolerance: float = 1e-6) -> Tensor:
        return torch.stack([member.contains(x, point, tolerance) for member in self.members]).any(0)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        candidates = torch.stack([member.sample(x, generator) for member in self.members])
        choice = torch.randint(len(self.members), (x.shape[0],), generator=generator, device=x.device)
        return _pick_per_sample(candidates, choice)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        """Refused: the members have attack variables of their own; attack :meth:`parts` one by one."""
        raise SpecError("a union has no attack step of its own; attack its members (parts) one by one")

    def parts(self) -> tuple[PerturbationSet, ...]:
        return tuple(part for member in self.members for part in member.parts())

    def select(self, x: Tensor, index: Tensor) -> PerturbationUnion:
        return PerturbationUnion([member.select(x, index) for member in self.members])

    def split(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        return self.members

    def scaled(self, factor: float) -> PerturbationUnion:
        return PerturbationUnion([member.scaled(factor) for member in self.members])

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """Refused: train on the members, each with a region of its own, and combine the losses."""
        raise SpecError("a union has no single small region; pass its members to a training strategy instead")

    def __repr__(self) -> str:
        return f"PerturbationUnion([{', '.join(map(repr, self.members))}])"


def _pick_per_sample(candidates: Tensor, choice: Tensor) -> Tensor:
    """``candidates[choice[b], b]`` for every sample b; candidates (M, B, *input), choice (B,)."""
    return candidates[choice, torch.arange(candidates.shape[1], device=candidates.device)]
