"""The contract of a perturbation set, as a class that stock auto_LiRPA accepts everywhere.

A :class:`PerturbationSet` poses as an linf box (its hull) wherever auto_LiRPA forgets which set it is
bounding, which makes every operator order sound; wherever auto_LiRPA asks, ``concretize`` answers for
the exact set.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from auto_LiRPA.linear_bound import LinearBound
from auto_LiRPA.patches import Patches
from auto_LiRPA.perturbations import PerturbationLpNorm
from auto_LiRPA.utils import eyeC
from torch import Tensor

from cure_plugin.checks import is_number
from cure_plugin.errors import SpecError
from cure_plugin.inputs import check_float_batch
from cure_plugin.sets.region import Region
from cure_plugin.sets.rows import Rows, dot, rows_of_matrix, rows_of_patches

if TYPE_CHECKING:
    from typing_extensions import Self

DOMAIN_TOLERANCE = 1e-6
"""How far a clean pixel may lie outside the domain (rounding of the data) before it is refused."""

Domain = tuple[float | Tensor, float | Tensor]
"""(lowest, highest) values of an input: numbers, or tensors that broadcast to a batch of inputs."""


class PerturbationSet(PerturbationLpNorm, ABC):
    """Base class of all sets; hand one to auto_LiRPA's ``BoundedTensor(x, perturbation)``.

    A subclass sets :attr:`name` and implements :meth:`box`, :meth:`deviation`, :meth:`project`, :meth:`random_start`,
    :meth:`ascend`, :meth:`scaled` and :meth:`small_region`; inputs are batches ``x`` of shape (B, *input), float.
    Where attacks move a parameter instead of the image, it implements :meth:`decode` too.
    """

    name: str
    """Short name used in reports and file names, e.g. ``linf``."""

    attack_step: float = 0.25
    """Relative size of the first attack step (see :meth:`ascend`)."""

    longest_leap: float = 2.0
    """Relative size of the first step in the search for counterexamples (see :meth:`leap`)."""

    shared_budget: bool = False
    """Whether the pixels share one l1 or l2 budget, which norm-coupled bounds make use of."""

    split_methods: tuple[str, ...] = ()
    """Bound methods worth trying on the pieces of :meth:`partition` and :meth:`split`; empty: no such pieces."""

    _initial: Tensor | None = None
    """Images that :meth:`init` has checked and is asking the box of."""

    def __init__(self) -> None:
        super().__init__(eps=0.0, norm=math.inf)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "partition" not in vars(cls) and "split_methods" not in vars(cls):
            cls.split_methods = ()  # the pieces of a parent class need not cover a set that refines it

    def set_eps(self, eps: float | Tensor) -> None:
        """auto_LiRPA's hook of eps schedulers, refused: only an lp ball has a radius.

        Raises:
            SpecError: always.
        """
        raise SpecError(f"{self!r} has no eps to set to {eps!r}; take scaled(factor) for a smaller or larger set")

    # -- what a set defines --------------------------------------------------------------------

    @abstractmethod
    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest box (lower, upper), each (B, *input), that holds the set around ``x``.

        Raises:
            SpecError: see :meth:`check`.
        """

    @abstractmethod
    def deviation(self, x: Tensor, rows: Rows) -> Tensor:
        """Minimum of ``rows . (x' - x)`` over the set around ``x`` (a lower bound of it is sound too).

        One value per row, in the shape of :func:`cure_plugin.sets.rows.dot` (rows, x); the caller applies
        ``rows.restore``.
        """

    @abstractmethod
    def project(self, x: Tensor, point: Tensor) -> Tensor:
        """A point of the set around ``x`` near ``point``; the identity on points of the set."""

    @abstractmethod
    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random attack variable per sample, first axis B; :meth:`decode` makes it an image of the set."""

    @abstractmethod
    def ascend(self, x: Tensor, variable: Tensor, gradient: Tensor, step: float) -> Tensor:
        """One attack step from ``variable`` along ``gradient`` (of the objective to increase, in the variable's shape).

        ``step`` is relative to the set's size; the result is a variable of the set again.
        """

    @abstractmethod
    def scaled(self, factor: float) -> PerturbationSet:
        """The same kind of set, ``factor`` (>= 0) times as large: annealing and certified curves use it."""

    @abstractmethod
    def small_region(self, x: Tensor, variable: Tensor, ratio: float) -> tuple[Tensor, PerturbationSet]:
        """SABR's region: a (centre, set) of relative size ``ratio`` near an attack ``variable``, inside the set."""

    # -- what every set then has, and may refine -----------------------------------------------

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'name', 'without a name')}>"

    def around(self, x: Tensor) -> Region:
        """The set around the images ``x`` (B, *input), which are checked once.

        Raises:
            SpecError: see :meth:`check`.
        """
        self.check(x)
        return Region(self, x)

    def check(self, x: Tensor) -> None:
        """Refuse images that there is no such set around.

        Raises:
            SpecError: ``x`` is no finite float batch, or outside the domain if the set has one; whatever else a set
                has to say.
        """
        if x is self._initial:
            return
        ends = check_batch(x)
        domain = getattr(self, "domain", None)
        if domain is not None:
            check_domain(x, domain, ends)

    def decode(self, x: Tensor, variable: Tensor) -> Tensor:
        """The image (B, *input) that an attack variable stands for; the variable itself unless overridden."""
        return variable

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random point of the set per sample, (B, *input)."""
        return self.decode(x, self.random_start(x, generator))

    def leap(self, x: Tensor, variable: Tensor, gradient: Tensor, share: float) -> Tensor:
        """One step in the search for counterexamples; ``share`` in [0, 1] falls from 1, the longest step, to 0."""
        return self.ascend(x, variable, gradient, self.longest_leap * share)

    def parts(self) -> tuple[PerturbationSet, ...]:
        """Sets to attack one by one that together are this one: itself, or a union's members."""
        return (self,)

    def needs_attack(self, ratio: float) -> bool:
        """Whether :meth:`small_region` of that relative size depends on the attack at all."""
        return True

    def split(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        """Smaller sets inside this one that together cover it around the image ``x`` (1, *input), if there are any."""
        return ()

    def partition(self, x: Tensor) -> tuple[PerturbationSet, ...]:
        """Sets inside this one that together cover it around ``x`` (1, *input): where branch and bound starts."""
        return (self,)

    def is_wide(self, x: Tensor) -> bool:
        """Whether a bound over the whole set around ``x`` is not worth a try before those over its partition."""
        return False

    def stack(self, others: Sequence[PerturbationSet]) -> PerturbationSet:
        """One set whose b-th sample is perturbed by ``others[b]``, all of this kind (pieces of a split).

        Raises:
            SpecError: sets of this kind cannot be told apart per sample.
        """
        raise SpecError(f"{type(self).__name__} cannot be stacked per sample; bound the sets one by one")

    def select(self, x: Tensor, index: Tensor) -> PerturbationSet:
        """The set for the samples ``index`` (int64) of the batch ``x``; itself unless it differs per sample."""
        return self

    def on(self, device: torch.device | str) -> Self:
        """The set with what it holds of tensors, its members' too, on ``device``."""
        other = copy.copy(self)
        other.__dict__.update({key: _on(value, device) for key, value in self.__dict__.items()})
        return other

    def contains(self, x: Tensor, point: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Whether each ``point`` lies in the set around ``x``, up to ``tolerance`` per coordinate; (B,) bool."""
        return (self.project(x, point) - point).abs().flatten(1).amax(1) <= tolerance

    def covers(self, other: PerturbationSet) -> bool:
        """Whether ``other`` is known to lie in this set around every image: its certificates are then implied."""

        def known(own: PerturbationSet, part: PerturbationSet) -> bool:
            # a subclass may be another set altogether: it answers only for itself
            return type(own) is type(part) and "covers_part" in vars(type(own)) and own.covers_part(part)

        return all(any(known(own, part) for own in self.parts()) for part in other.parts())

    def covers_part(self, other: Self) -> bool:
        """:meth:`covers` for a set of exactly this class; False (unknown) unless the class overrides it."""
        return False

    def radii(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Upper bounds of ||x' - x||_1 and ||x' - x||_2 over the set, (B,) each; those of the box unless overridden."""
        lower, upper = self.box(x)
        reach = torch.maximum(x - lower, upper - x).flatten(1)
        return reach.sum(1), reach.norm(dim=1)

    def refines_first_layer(self) -> bool:
        """Whether :meth:`deviation` beats the box hull on the rows of a first linear layer."""
        return True

    def within_hull(self) -> bool:
        """Whether :meth:`deviation` is nowhere looser than the box hull, so that the two need no intersection."""
        return False

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> tuple[LinearBound, Tensor, Any]:
        """auto_LiRPA's hook before a bound computation: the box hull of the set around ``x``.

        Raises:
            SpecError: see :meth:`check`.
        """
        self.check(x)
        self._initial = x
        try:
            self.x_L, self.x_U = self.box(x)
        finally:
            self._initial = None
        if not forward:
            return LinearBound(None, None, None, None, self.x_L, self.x_U), x, aux
        identity = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        weights = identity.expand(x.shape[0], -1, -1).unflatten(2, x.shape[1:])
        offset = torch.zeros_like(x)
        return LinearBound(weights, offset, weights, offset, self.x_L, self.x_U), x, aux

    def concretize(
        self, x: Tensor, A: Tensor | eyeC | Patches | None, sign: int = -1, aux: Any = None, **_: Any
    ) -> Tensor | None:
        """auto_LiRPA's hook: bound ``A x'`` over the set around ``x``, from below (sign -1) or above (+1).

        Args:
            x: (B, *input).
            A: a matrix (B, S, *input), ``Patches``, a lazy identity, or None.

        Returns:
            The bound in auto_LiRPA's layout: (B, S) for a matrix, (B, out_c, h, w) for dense patches
            (flattened for 0.7), (B, rows) for sparse patches; None where ``A`` is None.
        """
        if A is None:
            return None
        if isinstance(A, eyeC) or (isinstance(A, Patches) and A.identity == 1):
            lower, upper = self.box(x)
            return _select_identity(lower if sign < 0 else upper, A)
        rows = rows_of_patches(A) if isinstance(A, Patches) else rows_of_matrix(A, tuple(x.shape[1:]))
        at_clean = dot(rows, x)
        if sign < 0:
            return rows.restore(at_clean + self.deviation(x, rows))
        return rows.restore(at_clean - self.deviation(x, rows.negated()))


def _select_identity(bound: Tensor, identity: eyeC | Patches) -> Tensor:
    """The box end in the layout that an identity ``A`` asks for."""
    if isinstance(identity, eyeC):
        return bound.flatten(1)
    if identity.unstable_idx is None:
        return bound
    channel, across, down = identity.unstable_idx
    return bound[:, channel, across, down]


def check_batch(x: Tensor) -> tuple[float, float]:
    """Refuse what no set can start from.

    Returns:
        The smallest and the largest value.

    Raises:
        SpecError: not a float tensor with a batch axis, empty, or holding NaN or infinity.
    """
    check_float_batch(x)
    if x.numel() == 0:
        raise SpecError(f"x is empty (shape {tuple(x.shape)}); give at least one image")
    least, most = torch.stack(torch.aminmax(x.detach())).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise SpecError("x holds NaN or infinite values; clean the images before bounding them")
    return least, most


def check_set(perturbation: Any) -> None:
    """Refuse what is no set.

    Raises:
        SpecError: no :class:`PerturbationSet`.
    """
    if not isinstance(perturbation, PerturbationSet):
        raise SpecError(f"perturbation must be a cure_plugin set, got {perturbation!r}; see set_spec(text).build()")


def per_image(value: Tensor, x: Tensor) -> Tensor:
    """Reshape (B,) to broadcast against ``x`` (B, *input)."""
    return value.view(-1, *[1] * (x.ndim - 1))


def open_interval(domain: tuple[float, float]) -> tuple[float, float]:
    """``domain`` as (lowest, highest) numbers.

    Raises:
        SpecError: it holds nothing but an end.
    """
    pair = isinstance(domain, tuple | list) and len(domain) == 2 and all(is_number(end) for end in domain)
    if not pair or not domain[0] < domain[1]:
        raise SpecError(f"domain must be (lowest, highest) with lowest < highest, got {domain!r}")
    return float(domain[0]), float(domain[1])


def check_domain(x: Tensor, domain: Domain, ends: tuple[float, float]) -> None:
    """Refuse images outside the domain.

    Args:
        ends: the smallest and the largest value of ``x``.

    Raises:
        SpecError: a value further than :data:`DOMAIN_TOLERANCE` outside.
    """
    lowest, highest = domain
    if isinstance(lowest, Tensor) or isinstance(highest, Tensor):
        outside = bool((x < lowest - DOMAIN_TOLERANCE).any() or (x > highest + DOMAIN_TOLERANCE).any())
    else:
        outside = ends[0] < lowest - DOMAIN_TOLERANCE or ends[1] > highest + DOMAIN_TOLERANCE
    if outside:
        raise SpecError(
            f"x has values in [{ends[0]:.4g}, {ends[1]:.4g}], outside domain {shown_domain(domain)}; "
            "divide bytes by 255, make normalisation a layer of the net, or pass the domain of the normalised input"
        )


def shown_domain(domain: Domain | None) -> str:
    """``domain`` for messages, without the contents of tensors."""
    if not isinstance(domain, tuple | list):
        return repr(domain)
    ends = (f"tensor{tuple(end.shape)}" if isinstance(end, Tensor) else str(end) for end in domain)
    return f"({', '.join(ends)})"


def _on(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, tuple):
        return tuple(_on(one, device) for one in value)
    if isinstance(value, PerturbationSet):
        return value.on(device)
    return value.to(device) if isinstance(value, Tensor) else value
