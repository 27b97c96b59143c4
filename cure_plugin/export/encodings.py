"""One image and one set as a network and a property that outside verifiers read, in every form the set allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from cure_plugin.errors import SpecError
from cure_plugin.export.encoders import default_encoding, encoder, encodes, refused
from cure_plugin.sets import (
    PerturbationBox,
    PerturbationGeometric,
    PerturbationLpBall,
    PerturbationPatch,
    PerturbationSet,
    PerturbationUnion,
)
from cure_plugin.sets.geometric.hull import interval_hull
from cure_plugin.sets.geometric.planes import linear_planes
from cure_plugin.vnncomp.property import InputBox, Property
from cure_plugin.vnncomp.questions import (
    Question,
    contrast_and_brightness,
    free_inputs,
    free_pixels,
    in_boxes,
    in_l1_ball,
    in_l2_ball,
    of_parameters,
    parameter_units,
    slope_and_slack,
    window,
    within_distance,
)
from cure_plugin.vnncomp.vnnlib import VERSIONS

_PLANE_PIECES = {0: 1, 1: 20, 2: 8, 3: 4}
"""Sub-intervals per spatial parameter of the planes, by how many there are."""


@dataclass(frozen=True)
class Encoding:
    """A network and a property that together ask about one image and one set.

    Attributes:
        name: one of :func:`encoding_names`.
        model: the network to ask about. wanted: the property.
        exact: whether each input that the property allows stands for an image of the set (up to rounding); if
            not, the property allows more: ``unsat`` carries over to the set, ``sat`` does not.
        to_input: (attack variable of the set, first axis 1) -> flattened input of the network.
        to_image: flattened input of the network -> the image (1, *shape) that it stands for.
        versions: of VNNLIB that can say it.
    """

    name: str
    model: onnx.ModelProto
    wanted: Property
    exact: bool
    to_input: Callable[[Tensor], np.ndarray]
    to_image: Callable[[np.ndarray], Tensor]
    versions: tuple[str, ...] = VERSIONS


def encode(
    model: onnx.ModelProto, x: Tensor, label: int, perturbation: PerturbationSet, encoding: str | None = None
) -> Encoding:
    """``perturbation`` around one image, for the classifier ``model``.

    - ``box``: the pixel hull of any set.
    - ``boxes``: a box per patch position, union member or geometric cell.
    - ``parameters``: contrast and brightness as the network's inputs.
    - ``planes``: a transformation's parameters as inputs, with a slack per pixel for what a linear map misses.
    - ``patch``: the contents of a patch's position, or of the window of its block of positions, as inputs.
    - ``ball``: l2 and l1 balls as sums over inputs (VNNLIB 2.0 only).
    - ``distance``: the same with the distance as a further output; the image is pinned, one network serves all.

    Args:
        model: as :func:`cure_plugin.export.onnx_model` makes it.
        x: the image (*input), without batch axis.
        label: its class.
        encoding: one of :func:`encoding_names`; default: :func:`default_encoding`.

    Raises:
        SpecError: an unknown encoding, or one that the set does not allow; an image that float32 cannot hold.
    """
    name = default_encoding(perturbation) if encoding is None else encoding
    chosen = encoder(name, perturbation)
    image = x.detach().cpu().unsqueeze(0)
    if not torch.equal(image.float().double(), image.double()):
        raise SpecError("x must hold float32 numbers: networks are exported in float32; give x.float()")
    per_sample = getattr(perturbation, "block", None)
    if per_sample is not None and per_sample.ndim > 1:
        raise SpecError(f"{perturbation!r} differs per sample; select the set of one image")
    return chosen.make(model, image, label, perturbation)


def _image_encoding(
    name: str, question: Question, x: Tensor, own: PerturbationSet, exact: bool, versions: tuple[str, ...] = VERSIONS
) -> Encoding:
    """Encodings whose network is the classifier itself."""
    return Encoding(
        name,
        question.model,
        question.wanted,
        exact,
        lambda variable: _flat(own.decode(x.double(), variable.double())),
        lambda point: torch.from_numpy(point).view(x.shape),
        versions,
    )


def _front_encoding(
    name: str,
    question: Question,
    x: Tensor,
    exact: bool,
    to_input: Callable[[Tensor], np.ndarray],
    front: tuple[np.ndarray, np.ndarray],
) -> Encoding:
    """Encodings whose inputs a linear front (weight, bias) makes an image of."""
    weight, bias = front

    def to_image(point: np.ndarray) -> Tensor:
        return torch.from_numpy(weight.astype(np.float64) @ point + bias).view(x.shape)

    return Encoding(name, question.model, question.wanted, exact, to_input, to_image)


@encodes("box")
def _box(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationSet) -> Encoding:
    return _image_encoding("box", in_boxes(model, [_hull(own, x)], label), x, own, _is_box(own))


@encodes("boxes", preferred=lambda own, version: type(own) in (PerturbationPatch, PerturbationUnion))
def _boxes(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationSet) -> Encoding:
    pieces = _leaves(own, x)
    question = in_boxes(model, [_hull(piece, x) for piece in pieces], label)
    return _image_encoding("boxes", question, x, own, all(map(_is_box, pieces)))


def _leaves(own: PerturbationSet, x: Tensor) -> list[PerturbationSet]:
    """Sets inside ``own`` that cover it: positions of a patch, members of a union, cells of a geometric set."""
    if type(own) is PerturbationUnion:
        return [leaf for part in own.parts() for leaf in _leaves(part, x)]
    if type(own) is PerturbationPatch:
        r0, r1, c0, c1 = own.positions(x)[0].tolist()
        return [
            PerturbationPatch(own.height, own.width, (r, r, c, c), own.domain)
            for r in range(r0, r1 + 1)
            for c in range(c0, c1 + 1)
        ]
    # exact types: a subclass may be another set, which its parent's cells do not cover
    return list(own.partition(x)) if type(own) is PerturbationGeometric else [own]


def _is_box(own: PerturbationSet) -> bool:
    """Whether the hull is the set: boxes, linf balls, and patches at one position."""
    if type(own) is PerturbationBox:
        return True
    if type(own) is PerturbationLpBall:
        return not own.shared_budget
    return type(own) is PerturbationPatch and own.block is not None and _positions(own.block) == 1


def _positions(block: Tensor) -> int:
    r0, r1, c0, c1 = block.flatten().tolist()
    return int((r1 - r0 + 1) * (c1 - c0 + 1))


def _is_affine(own: PerturbationGeometric, _: str = "") -> bool:
    return own.lower.ndim == 1 and own.names in (("C",), ("B",), ("C", "B"))


@encodes("parameters", PerturbationGeometric, words="contrast and brightness; use planes", preferred=_is_affine)
def _parameters(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationGeometric) -> Encoding:
    if not _is_affine(own):
        raise refused("parameters", own, "contrast and brightness alone, in that order, are affine; use planes")
    front = contrast_and_brightness(_flat(x), own.parameters)
    units = parameter_units(own.parameters)
    box = (own.lower.numpy() / units, own.upper.numpy() / units)
    question = of_parameters(model, *front, box, label)
    return _front_encoding("parameters", question, x, True, lambda variable: _flat(variable) / units, front)


@encodes("planes", PerturbationGeometric, words="geometric sets", preferred=lambda own, version: not _is_affine(own))
def _planes(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationGeometric) -> Encoding:
    if own.lower.ndim != 1:
        raise refused("planes", own, "it is for geometric sets with one box of parameters")
    slope, box = planes_with_slack(x, own)
    weight, bias, inputs = slope_and_slack(slope, box)
    free = free_inputs(box, slope.shape[1])

    def to_input(variable: Tensor) -> np.ndarray:
        parameters = _flat(variable)
        image = _flat(own.decode(x.double(), variable.double()))
        return np.concatenate([parameters, image - slope.astype(np.float64) @ parameters])[free]

    question = of_parameters(model, weight, bias, inputs, label)
    return _front_encoding("planes", question, x, False, to_input, (weight, bias))


def planes_with_slack(x: Tensor, own: PerturbationGeometric) -> tuple[np.ndarray, InputBox]:
    """A slope (d, k), float32, and a box of k parameters and d slacks around one image (1, C, H, W).

    Every transformed image is slope @ parameters + slack for parameters and a slack in the box.
    """
    spatial = sum(name not in ("C", "B") for name in own.parameters)
    planes = linear_planes(
        x.double(), own.names, own.lower.unsqueeze(0), own.upper.unsqueeze(0), _PLANE_PIECES.get(spatial, 2)
    )
    lower_slope, lower_offset, upper_slope, upper_offset = (plane[0].flatten(-3).numpy() for plane in planes)
    # one slope for both planes, as float32 numbers; the slack takes what the planes' own slopes differ by
    slope = ((lower_slope + upper_slope) / 2).astype(np.float32)
    centre = ((own.lower + own.upper) / 2).numpy()
    radius = (own.upper - own.lower).numpy() / 2
    shift = centre @ slope.astype(np.float64)
    slack_low = lower_offset - shift - radius @ np.abs(lower_slope - slope)
    slack_high = upper_offset - shift + radius @ np.abs(upper_slope - slope)
    rounding = 1e-9 * (1 + np.abs(shift) + np.abs(lower_offset) + np.abs(upper_offset))
    slack_low, slack_high = slack_low - rounding, slack_high + rounding
    still = _stays_black(x, own)
    slack_low[still] = slack_high[still] = 0
    slope[:, still] = np.array([name == "B" for name in own.parameters], dtype=np.float32)[:, None]
    lower, upper = np.concatenate([own.lower.numpy(), slack_low]), np.concatenate([own.upper.numpy(), slack_high])
    return slope.T, (lower, upper)


def _stays_black(x: Tensor, own: PerturbationGeometric) -> np.ndarray:
    """Which pixels of one image are 0 under every transformation of ``own``, but for the brightness that comes last."""
    columns = [i for i, name in enumerate(own.parameters) if name not in ("C", "B")]
    names = [name for name in own.names if name not in ("C", "B")]
    if "B" in own.names[:-1]:
        return np.zeros(x.numel(), dtype=bool)
    if not names:
        return _flat(x) == 0
    box = own.lower[columns].unsqueeze(0), own.upper[columns].unsqueeze(0)
    low, high = interval_hull(x.double(), names, *box, 1)
    return (_flat(low) == 0) & (_flat(high) == 0)


@encodes("patch", PerturbationPatch, words="patches")
def _patch(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationPatch) -> Encoding:
    lower, upper = _hull(own, x)
    r0, r1, c0, c1 = own.positions(x)[0].tolist()
    free = window(x.shape, r0, c0, r1 - r0 + own.height, c1 - c0 + own.width)
    front = free_pixels(_flat(x), free)
    question = of_parameters(model, *front, (lower[free], upper[free]), label)
    single = r0 == r1 and c0 == c1
    return _front_encoding("patch", question, x, single, lambda v: _flat(own.decode(x, v))[free], front)


@encodes(
    "ball",
    PerturbationLpBall,
    words="l1 and l2 balls",
    preferred=lambda own, version: own.shared_budget and version != "1.0",
)
def _ball(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationLpBall) -> Encoding:
    norm, eps = _radius("ball", own)
    image, hull = _flat(x), _hull(own, x)
    if norm == 2:
        return _image_encoding("ball", in_l2_ball(model, image, hull, eps, label), x, own, True, ("2.0",))
    question = in_l1_ball(model, image, hull, eps, label)

    def to_input(variable: Tensor) -> np.ndarray:
        moved = _flat(own.decode(x, variable)) - image
        return np.concatenate([image, np.maximum(moved, 0), np.maximum(-moved, 0)])

    def to_image(point: np.ndarray) -> Tensor:
        start, up, down = point.reshape(3, -1)
        return torch.from_numpy(start + up - down).view(x.shape)

    return Encoding("ball", question.model, question.wanted, True, to_input, to_image, ("2.0",))


@encodes(
    "distance",
    PerturbationLpBall,
    words="l1 and l2 balls",
    preferred=lambda own, version: own.shared_budget and version == "1.0",
)
def _distance(model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationLpBall) -> Encoding:
    norm, eps = _radius("distance", own)
    image = _flat(x)
    question = within_distance(model, image, _hull(own, x), "l2" if norm == 2 else "l1", eps, label)
    return Encoding(
        "distance",
        question.model,
        question.wanted,
        True,
        lambda variable: np.concatenate([image, _flat(own.decode(x, variable))]),
        lambda point: torch.from_numpy(point[x.numel() :]).view(x.shape),
    )


def _radius(encoding: str, own: PerturbationLpBall) -> tuple[float, float]:
    """(p, eps) of an l1 or l2 ball that is the same for all images."""
    if not own.shared_budget:
        raise refused(encoding, own, "it is for l1 and l2 balls")
    eps = torch.as_tensor(own.eps, dtype=torch.float64)
    if eps.numel() != 1:
        raise refused(encoding, own, "a radius per sample belongs to no single image")
    return own.p, float(eps)


def _hull(own: PerturbationSet, x: Tensor) -> InputBox:
    """The pixel hull, in float64."""
    if type(own) is PerturbationGeometric:
        own = copy.copy(own)
        own.planes = False  # the hull has no use for them
    lower, upper = own.box(x.double())
    return _flat(lower), _flat(upper)


def _flat(values: Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu().double().flatten().numpy())
