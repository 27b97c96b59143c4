"""Adversarial patches: a p x q square somewhere, its pixels free in the domain, all channels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cure_plugin.checks import as_numbers, check_number, is_number
from cure_plugin.errors import SpecError
from cure_plugin.sets.base import PerturbationSet, open_interval
from cure_plugin.sets.box import PerturbationBox
from cure_plugin.sets.rows import Rows
from cure_plugin.sets.windows import crop, pixel_gain, smallest_overlap_sum, smallest_square_sum

if TYPE_CHECKING:
    from typing_extensions import Self

_PARTITION_SIDE = 3
"""Positions per side of the blocks that branch and bound starts from."""


class PerturbationPatch(PerturbationSet):
    """All images that differ from x inside one height x width square only.

    The square's top left corner lies in a block of positions: rows r0 .. r1 and columns c0 .. c1. A block
    is bounded exactly, in one go; :meth:`split` halves it.

    Args:
        height, width: of the square, at least 1.
        block: (r0, r1, c0, c1), ends included: four numbers, or a tensor (B, 4) with a block per sample;
            None for every position.
        domain: (lowest, highest) pixel value.

    Raises:
        SpecError: a size below 1, an empty domain, a reversed block.
    """

    attack_step = 0.25
    split_methods = ("IBP", "CROWN-IBP", "CROWN")

    def __init__(
        self,
        height: int,
        width: int,
        block: tuple[int, int, int, int] | Tensor | None = None,
        domain: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        if not all(is_number(side) and side >= 1 and side % 1 == 0 for side in (height, width)):
            raise SpecError(f"a patch needs whole sides of at least 1 pixel, got {height!r} x {width!r}")
        ends = None if block is None else as_numbers("block", block)
        if ends is not None and (ends.shape[-1:] != (4,) or bool((ends[..., ::2] > ends[..., 1::2]).any())):
            raise SpecError(f"block must be (r0, r1, c0, c1) with r0 <= r1 and c0 <= c1, got {block!r}")
        self.height, self.width, self.block = int(height), int(width), None if ends is None else ends.cpu()
        self.domain = open_interval(domain)
        self.name = f"patch{self.height}x{self.width}"

    def check(self, x: Tensor) -> None:
        super().check(x)
        self.positions(x)

    def positions(self, x: Tensor) -> Tensor:
        """The block of top left corners for each sample, (B, 4) int64: r0, r1, c0, c1, ends included.

        Raises:
            SpecError: no image batch, an image smaller than the patch, a block outside the image.
        """
        if x.ndim != 4 or x.shape[2] < self.height or x.shape[3] < self.width:
            raise SpecError(
                f"a {self.height} x {self.width} patch needs images (B, C, H, W) of that size at least, "
                f"got {tuple(x.shape)}"
            )
        last_row, last_column = x.shape[2] - self.height, x.shape[3] - self.width
        everywhere = torch.tensor([0, last_row, 0, last_column], device=x.device)
        if self.block is None:
            return everywhere.expand(x.shape[0], 4)
        ends = self.block.expand(x.shape[0], 4)
        if bool((ends < 0).any() or (ends[:, 1] > last_row).any() or (ends[:, 3] > last_column).any()):
            raise SpecError(
                f"block {self.block} leaves the image: positions are 0 .. {last_row} and 0 .. {last_column}"
            )
        return ends.to(x.device)

    def _reach(self, x: Tensor) -> Tensor:
        """Which pixels some square of the block covers, (B, 1, H, W) bool."""
        r0, r1, c0, c1 = (end.view(-1, 1) for end in self.positions(x).unbind(1))
        rows = torch.arange(x.shape[2], device=x.device)
        columns = torch.arange(x.shape[3], device=x.device)
        in_rows = (rows >= r0) & (rows < r1 + self.height)
        in_columns = (columns >= c0) & (columns < c1 + self.width)
        return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far each pixel may move down (<= 0) and up (>= 0) if the square covers it; 0 out of reach."""
        reach = self._reach(x)
        down, up = (self.domain[0] - x).clamp(max=0), (self.domain[1] - x).clamp(min=0)
        return torch.where(reach, down, 0), torch.where(reach, up, 0)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.check(x)
        down, up = self._room(x)
        return x + down, x + up

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        """Exact: the smallest sum, over the squares of the block, of each pixel's own minimum.

        Pixels out of the block's reach have no room, so a square that sticks out of the reach covers no
        more than one inside it.
        """
        return self._over_image(x, rows) if rows.whole else self._over_windows(x, rows)

    def _over_image(self, x: Tensor, rows: Rows) -> Tensor:
        """Rows over the whole image: only the part within reach is looked at."""
        ends = self.positions(x)
        size = (ends[:, 1::2] - ends[:, ::2]).amax(0).tolist()
        height, width = size[0] + self.height, size[1] + self.width
        # blocks of a batch may differ in size; a crop that would leave the image is moved inside
        top = ends[:, 0].clamp(max=x.shape[2] - height)
        left = ends[:, 2].clamp(max=x.shape[3] - width)
        a = rows.coefficients.unflatten(-1, rows.window).expand(x.shape[0], -1, -1, -1, -1)
        a, down, up = (crop(t, top, left, height, width) for t in (a, *self._room(x)))
        gain = torch.minimum(a * down.unsqueeze(1), a * up.unsqueeze(1)).sum(2)
        return smallest_square_sum(gain, self.height, self.width)

    def _over_windows(self, x: Tensor, rows: Rows) -> Tensor:
        """Rows over windows of the image: only the windows within reach are looked at."""
        down, up = (rows.pick(t) for t in self._room(x))
        shape = torch.broadcast_shapes(rows.coefficients.shape, down.shape)
        touched = ((down != 0) | (up != 0)).any(-1).expand(shape[:-1])
        a, down, up = (t.expand(shape)[touched] for t in (rows.coefficients, down, up))
        gain = pixel_gain(a, down, up, rows.window)
        result = gain.new_zeros(shape[:-1])
        result[touched] = smallest_overlap_sum(gain, rows.extent(self.height), rows.extent(self.width))
        return result

    def radii(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the square that can move furthest."""
        down, up = self._room(x)
        reach = torch.maximum(-down, up)
        l1, l2 = (-smallest_square_sum(-part.sum(1), self.height, self.width) for part in (reach, reach.square()))
        return l1, l2.clamp(min=0).sqrt()

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        """Keep the square of the block with the largest change, clipped to the domain; undo the rest."""
        change = (point.clamp(*self.domain) - x).square().sum(1)
        corner = self._best_corner(x, change)
        return torch.where(self._square(x, corner), point.clamp(*self.domain), x)

    def _best_corner(self, x: Tensor, score: Tensor) -> Tensor:
        """Top left corner (B, 2) of the allowed square with the largest sum of ``score`` (B, H, W)."""
        sums = torch.nn.functional.avg_pool2d(score.unsqueeze(1), (self.height, self.width), stride=1).squeeze(1)
        r0, r1, c0, c1 = (end.view(-1, 1, 1) for end in self.positions(x).unbind(1))
        rows = torch.arange(sums.shape[1], device=x.device).view(1, -1, 1)
        columns = torch.arange(sums.shape[2], device=x.device).view(1, 1, -1)
        allowed = (rows >= r0) & (rows <= r1) & (columns >= c0) & (columns <= c1)
        best = sums.masked_fill(~allowed, -torch.inf).flatten(1).argmax(1)
        return torch.stack([best // sums.shape[2], best % sums.shape[2]], dim=1)

    def _square(self, x: Tensor, corner: Tensor) -> Tensor:
        """Mask (B, 1, H, W) of the square at each ``corner`` (B, 2)."""
        rows = torch.arange(x.shape[2], device=x.device) - corner[:, :1]
        columns = torch.arange(x.shape[3], device=x.device) - corner[:, 1:]
        in_rows, in_columns = (rows >= 0) & (rows < self.height), (columns >= 0) & (columns < self.width)
        return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        ends = self.positions(x)
        share = torch.rand(x.shape[0], 2, generator=generator, device=x.device)
        count = ends[:, 1::2] - ends[:, ::2] + 1
        corner = ends[:, ::2] + (share * count).long().clamp(max=count - 1)
        content = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        # corners of the content's box are where linear functions peak
        content = torch.where(content < 0.25, 0.0, torch.where(content > 0.75, 1.0, content))
        content = self.domain[0] + (self.domain[1] - self.domain[0]) * content
        return torch.where(self._square(x, corner), content, x)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        """Move the square to where the gradient promises most, and its pixels along the gradient's sign."""
        room = torch.where(gradient > 0, self.domain[1] - variable, variable - self.domain[0])
        corner = self._best_corner(x, (gradient.abs() * room).sum(1) + (variable - x).abs().sum(1))
        moved = variable + step * (self.domain[1] - self.domain[0]) * gradient.sign()
        return torch.where(self._square(x, corner), moved.clamp(*self.domain), x)

    def scaled(self, factor: float) -> PerturbationPatch:
        """A square with sides ``factor`` times as long, rounded up, at the same block of positions."""
        check_number(f"factor of {self.name}", factor)
        height, width = (max(1, -int(-side * factor // 1)) for side in (self.height, self.width))
        return PerturbationPatch(height, width, self.block, self.domain)

    def covers_part(self, other: Self) -> bool:
        if other.domain != self.domain or self.block is not None or other.block is not None:
            return False
        return other.height <= self.height and other.width <= self.width

    def split(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        """The block halved across its longer side; empty for a single position.

        Raises:
            SpecError: more than one image; split the sets of a batch one by one.
        """
        r0, r1, c0, c1 = self._only_block(x)
        if r1 == r0 and c1 == c0:
            return ()
        if r1 - r0 >= c1 - c0:
            middle = (r0 + r1) // 2
            halves = ((r0, middle, c0, c1), (middle + 1, r1, c0, c1))
        else:
            middle = (c0 + c1) // 2
            halves = ((r0, r1, c0, middle), (r0, r1, middle + 1, c1))
        return tuple(self._with_block(half) for half in halves)

    def partition(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        """Blocks of a few neighbouring positions: large ones are bounded too loosely to be worth a try.

        Raises:
            SpecError: as :meth:`split`.
        """
        r0, r1, c0, c1 = self._only_block(x)
        corners = itertools.product(range(r0, r1 + 1, _PARTITION_SIDE), range(c0, c1 + 1, _PARTITION_SIDE))
        return tuple(
            self._with_block((r, min(r + _PARTITION_SIDE - 1, r1), c, min(c + _PARTITION_SIDE - 1, c1)))
            for r, c in corners
        )

    def _only_block(self, x: Tensor) -> tuple[int, int, int, int]:
        """The block of positions around one image."""
        if x.shape[0] != 1:
            raise SpecError(f"split works on one image (1, C, H, W), got {tuple(x.shape)}")
        r0, r1, c0, c1 = self.positions(x)[0].tolist()
        return r0, r1, c0, c1

    def _with_block(self, block: tuple[int, int, int, int]) -> PerturbationPatch:
        return PerturbationPatch(self.height, self.width, block, self.domain)

    def select(self, x: Tensor, index: Tensor) -> PerturbationPatch:
        if self.block is None or self.block.ndim == 1:
            return self
        return PerturbationPatch(self.height, self.width, self.block[index.to(self.block.device)], self.domain)

    def stack(self, others: Sequence[PerturbationSet]) -> PerturbationSet:
        blocks = []
        for other in others:
            if not isinstance(other, PerturbationPatch) or other.block is None or other.block.ndim != 1:
                raise SpecError("only patches with a block of positions each can be stacked; split them first")
            if (other.height, other.width, other.domain) != (self.height, self.width, self.domain):
                raise SpecError(f"only patches of one size and domain can be stacked, got {self!r} and {other!r}")
            blocks.append(other.block)
        return PerturbationPatch(self.height, self.width, torch.stack(blocks), self.domain)

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """A box of relative size ``ratio`` around the attack's content, at the attack's position."""
        corner = self._best_corner(x, (variable - x).square().sum(1))
        return _content_region(x, variable, self._square(x, corner), self.domain, ratio)

    def __repr__(self) -> str:
        where = "" if self.block is None else f", block={self.block.tolist()}"
        return f"PerturbationPatch({self.height}, {self.width}{where})"


class PerturbationL0(PerturbationSet):
    """All images that differ from x in at most ``pixels`` pixels (all channels of each), free in the domain.

    Args:
        pixels: at least 0. domain: (lowest, highest) pixel value.

    Raises:
        SpecError: a negative or fractional count, an empty domain.
    """

    def __init__(self, pixels: int, domain: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        if pixels < 0 or int(pixels) != pixels:
            raise SpecError(f"pixels must be a whole number >= 0, got {pixels!r}")
        self.pixels = int(pixels)
        self.domain = open_interval(domain)
        self.name = f"l0_{self.pixels}"

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.ndim != 4:
            raise SpecError(f"an l0 set counts pixels of images (B, C, H, W), got shape {tuple(x.shape)}")

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixels == 0:
            return torch.zeros_like(x), torch.zeros_like(x)
        return (self.domain[0] - x).clamp(max=0), (self.domain[1] - x).clamp(min=0)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.check(x)
        down, up = self._room(x)
        return x + down, x + up

    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        """Exact: the sum of the ``pixels`` smallest of the pixels' own minima."""
        down, up = (rows.pick(t) for t in self._room(x))
        gain = pixel_gain(rows.coefficients, down, up, rows.window).flatten(-2)
        if self.pixels >= gain.shape[-1]:
            return gain.sum(-1)
        return gain.topk(self.pixels, dim=-1, largest=False).values.sum(-1)

    def _keep(self, x: Tensor, score: Tensor) -> Tensor:
        """Mask (B, 1, H, W) of the pixels with the largest ``score`` (B, H, W)."""
        chosen = torch.zeros_like(score, dtype=torch.bool).flatten(1)
        best = score.flatten(1).topk(min(self.pixels, chosen.shape[1]), dim=1).indices
        return chosen.scatter(1, best, True).view_as(score).unsqueeze(1)

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        """Keep the largest changes, clipped to the domain; undo the rest."""
        clipped = point.clamp(*self.domain)
        return torch.where(self._keep(x, (clipped - x).square().sum(1)), clipped, x)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        chosen = self._keep(x, torch.rand(x[:, 0].shape, generator=generator, dtype=x.dtype, device=x.device))
        content = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device).round()
        return torch.where(chosen, self.domain[0] + (self.domain[1] - self.domain[0]) * content, x)

    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        """The pixels that promise most go to the domain's end that the gradient points at."""
        end = torch.where(gradient > 0, self.domain[1], self.domain[0]).to(x)
        gain = (gradient * (end - x)).sum(1)
        return torch.where(self._keep(x, gain), end, x)

    def covers_part(self, other: Self) -> bool:
        return other.domain == self.domain and other.pixels <= self.pixels

    def scaled(self, factor: float) -> PerturbationL0:
        check_number(f"factor of {self.name}", factor)
        return PerturbationL0(max(0, -int(-self.pixels * factor // 1)), self.domain)

    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """A box of relative size ``ratio`` around the attack's content, at the attack's pixels."""
        chosen = self._keep(x, (variable - x).square().sum(1))
        return _content_region(x, variable, chosen, self.domain, ratio)

    def __repr__(self) -> str:
        return f"PerturbationL0({self.pixels})"


def _content_region(
    x: Tensor, variable: Tensor, free: Tensor, domain: tuple[float, float], ratio: float
) -> tuple[Tensor, PerturbationBox]:
    """(centre, box): pixels in ``free`` within ratio * half the domain of ``variable``, the others as in ``x``."""
    if not 0 <= ratio <= 1:
        raise SpecError(f"ratio (lambda) must lie in [0, 1], got {ratio!r}")
    lowest, highest = domain
    radius = ratio * (highest - lowest) / 2
    centre = torch.where(free, variable.clamp(lowest + radius, highest - radius), x)
    return centre, PerturbationBox(torch.where(free, centre - radius, x), torch.where(free, centre + radius, x))
