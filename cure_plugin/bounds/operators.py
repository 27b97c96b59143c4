"""Which nodes auto_LiRPA bounds soundly, by kind, attributes, version and mode: the acceptance table, as data.

A node gets the mode of the first row that fits it. A net is bounded in patches mode where every node may be, in matrix
mode where one may not, and refused where a node's row says so. A kind without a row is unknown: it is bounded in matrix
mode, and only if the self-check (:mod:`cure_plugin.bounds.self_check`) finds its bounds to hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from auto_LiRPA import __version__ as library

PATCHES, MATRIX, REFUSED, UNKNOWN = "patches", "matrix", "refused", "unknown"
"""What a row says: sound in both modes; in matrix mode; in none; nothing (no row fits)."""

ANY = "any"
"""Stands for every kind of node."""

_GEOMETRY = "tests/test_acceptance.py::test_geometry_decides_the_mode"
_NETS = "tests/test_random_nets.py::test_no_bound_is_broken"
_SPELLED = "tests/test_elementwise.py"
_LISTED = "tests/test_acceptance.py::test_listed_kinds"


def moves(node: Any) -> bool:
    """Whether what ``node`` computes depends on the values of the net's input.

    auto_LiRPA counts weights and buffers too, and shapes.
    """
    return _reaches_input(node, through_shapes=False)


def is_fixed(node: Any) -> bool:
    """Whether ``node`` computes the same for every input, of whatever batch."""
    return not _reaches_input(node, through_shapes=True)


def _reaches_input(node: Any, through_shapes: bool) -> bool:
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if type(one).__name__ == "BoundInput":
            return True
        if one.name not in seen and (through_shapes or type(one).__name__ != "BoundShape"):
            seen.add(one.name)
            pending += one.inputs
    return False


_ELEMENTWISE = ("BoundAdd", "BoundDiv", "BoundMul", "BoundNeg", "BoundSub")


def is_elementwise(node: Any) -> bool:
    """Whether ``node`` is its one moving input times a constant, or plus one, entry by entry.

    The constants are the same for all samples and do not enlarge the input's shape.
    """
    if type(node).__name__ not in _ELEMENTWISE:
        return False
    moving = [part for part in node.inputs if moves(part)]
    shapes = [part.output_shape for part in node.inputs if not moves(part)]
    if len(moving) != 1 or (type(node).__name__ == "BoundDiv" and moving[0] is not node.inputs[0]):
        return False
    axes = len(node.output_shape)
    return moving[0].output_shape == node.output_shape and all(len(one) < axes or one[0] == 1 for one in shapes)


def _always(node: Any) -> bool:
    return True


def _is_constant(node: Any) -> bool:
    return not moves(node)


def _is_square(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[2] == shape[3]


def _is_plain_convolution(node: Any) -> bool:
    """Square maps, kernel, stride and padding, no dilation, no groups."""
    weight = node.inputs[1].output_shape
    same = all(len(set(map(int, sizes))) == 1 for sizes in (weight[2:], node.stride, node.padding, node.dilation))
    square = _is_square(node.inputs[0].output_shape) and _is_square(node.output_shape)
    return same and square and node.groups == 1 and int(node.dilation[0]) == 1


def _sums_maps(node: Any) -> bool:
    """Two perturbed summands of one shape."""
    return all(moves(part) and part.output_shape == node.output_shape for part in node.inputs)


def _makes_features(node: Any) -> bool:
    """All of a sample's entries in a row, in their order."""
    before, after = node.inputs[0].output_shape, node.output_shape
    return len(after) == 2 and after[1] == math.prod(before[1:])


def _is_flat(node: Any) -> bool:
    return len(node.inputs[0].output_shape) == 2


def _is_channelwise(node: Any) -> bool:
    return len(node.output_shape) in (2, 4)


def _second_moves(node: Any) -> bool:
    return moves(node.inputs[1])


def _divides_by_root(node: Any) -> bool:
    return type(node.inputs[1]).__name__ == "BoundSqrt" and moves(node.inputs[1])


def _scales_maps(node: Any) -> bool:
    return is_elementwise(node) and _is_channelwise(node)


@dataclass(frozen=True)
class Operator:
    """One row: what is known of a kind of node.

    Attributes:
        kind: auto_LiRPA's class, or :data:`ANY`. layers: what people write. mode: see :data:`PATCHES`.
        reason: why, and for ``refused`` the remedy. test: where it is shown.
        when: which nodes of that kind the row is about.
        versions: auto_LiRPA's, that the row is about; empty: all.
    """

    kind: str
    layers: str
    mode: str
    reason: str
    test: str = _NETS
    when: Callable[[Any], bool] = _always
    versions: tuple[str, ...] = ()

    def fits(self, node: Any) -> bool:
        """Whether the row is about ``node``, a node of a BoundedModule of the version at hand."""
        return (
            self.kind in (ANY, type(node).__name__)
            and (not self.versions or library in self.versions)
            and self.when(node)
        )


_LINES = "auto_LiRPA's slopes, with offsets in closed form (bounds/s_shaped.py)"
_OWN = "pulled back through its own forward pass (bounds/linear_nodes.py)"
_PATCHES_FAIL = "patches mode knows no such rows"
_SCALED = "rows are scaled, constants added (bounds/elementwise.py)"

OPERATORS: tuple[Operator, ...] = (
    Operator("BoundInput", "the input", PATCHES, "the set's own hull and concretize"),
    Operator(
        "BoundDropout",
        "Dropout",
        REFUSED,
        "auto_LiRPA bounds it with its noise even in eval mode; put nn.Identity in its place",
        "tests/test_misuse.py",
    ),
    Operator(ANY, "weights, buffers, constants, what is made of them alone", PATCHES, "constant", when=_is_constant),
    Operator(
        "BoundConv",
        "Conv2d, square in every respect, no dilation, no groups",
        PATCHES,
        "rows are windows of one size and step",
        _GEOMETRY,
        _is_plain_convolution,
    ),
    Operator(
        "BoundConv",
        "Conv1d, Conv2d of any geometry",
        MATRIX,
        "patches mode steps rows by the height, forgets dilation behind a first layer, and mixes groups: wrong bounds; "
        + _OWN,
        _GEOMETRY,
    ),
    Operator("BoundLinear", "Linear on features", PATCHES, "an exact matrix product", when=_is_flat),
    Operator("BoundLinear", "Linear on more axes, Gemm", MATRIX, _PATCHES_FAIL),
    Operator("BoundRelu", "ReLU", PATCHES, "CROWN's triangle, row by row"),
    Operator(
        "BoundBatchNormalization",
        "BatchNorm in eval mode",
        PATCHES,
        "a scale and shift per channel",
        when=_is_channelwise,
    ),
    Operator("BoundBatchNormalization", "BatchNorm of sequences", MATRIX, _PATCHES_FAIL),
    Operator("BoundAdd", "sum of two branches of one shape", PATCHES, "rows are added", when=_sums_maps),
    Operator("BoundAdd", "sum with a constant that fits in", PATCHES, _SCALED, _SPELLED, _scales_maps),
    Operator("BoundAdd", "sum with a larger constant or a smaller summand", MATRIX, f"{_PATCHES_FAIL}; {_OWN}"),
    Operator("BoundFlatten", "Flatten to features", PATCHES, "rows are reshaped", when=_makes_features),
    Operator("BoundFlatten", "Flatten of some axes", MATRIX, _PATCHES_FAIL),
    Operator("BoundReshape", "view to features", PATCHES, "rows are reshaped", when=_makes_features),
    Operator("BoundReshape", "view between layers", MATRIX, "a window is no window of another view; rows are reshaped"),
    Operator("BoundSqueeze", "squeeze", MATRIX, _OWN),
    Operator("BoundUnsqueeze", "unsqueeze", MATRIX, _OWN),
    Operator("BoundTranspose", "permute, transpose", MATRIX, _OWN),
    Operator("BoundConcat", "cat", MATRIX, _OWN),
    Operator("BoundSlice", "slices, narrow", MATRIX, _OWN),
    Operator("BoundPad", "ConstantPad, F.pad", MATRIX, "no version reads it; bounds/pad.py does"),
    Operator("BoundGather", "an index that depends on the input", REFUSED, "take a fixed index", when=_second_moves),
    Operator(
        "BoundGather",
        "index_select",
        MATRIX,
        "0.3 loses all but one use of a feature picked twice; " + _OWN,
        _LISTED,
    ),
    Operator(
        "BoundConvTranspose",
        "ConvTranspose1d, ConvTranspose2d",
        MATRIX,
        "patches of it are wrong where maps are not square; " + _OWN,
    ),
    Operator("BoundAveragePool", "AvgPool", MATRIX, "0.3 is wrong where windows overlap or are padded; " + _OWN),
    Operator("BoundGlobalAveragePool", "AdaptiveAvgPool(1)", MATRIX, _OWN),
    Operator("BoundReduceMean", "mean over axes", MATRIX, _OWN),
    Operator("BoundReduceSum", "sum over axes", MATRIX, _OWN),
    Operator("BoundMaxPool", "MaxPool", MATRIX, "0.3 fails off the beaten track; bounds/max_pool.py"),
    Operator("BoundNeg", "negation", PATCHES, _SCALED, _SPELLED, _scales_maps),
    Operator("BoundNeg", "negation of sequences", MATRIX, _SCALED),
    Operator("BoundSub", "difference from a constant that fits in", PATCHES, _SCALED, _SPELLED, _scales_maps),
    Operator("BoundSub", "difference", MATRIX, f"{_PATCHES_FAIL}; {_OWN}"),
    Operator("BoundMul", "product with a constant that fits in", PATCHES, _SCALED, _SPELLED, _scales_maps),
    Operator(
        "BoundMul", "product", MATRIX, f"{_PATCHES_FAIL}; by a constant: {_OWN}; of two perturbed factors: McCormick"
    ),
    Operator(
        "BoundDiv",
        "quotient by a root",
        REFUSED,
        "auto_LiRPA takes it for a layer normalisation; use BatchNorm, or multiply by a power",
        _LISTED,
        _divides_by_root,
    ),
    Operator(
        "BoundDiv",
        "quotient by what depends on the input",
        REFUSED,
        "0.3 bounds it wrongly where the numerator changes sign; leave a final Softmax out (margins are of logits), or "
        "use auto_LiRPA 0.7.1",
        _LISTED,
        _second_moves,
        ("0.3",),
    ),
    Operator("BoundDiv", "quotient by a constant that fits in", PATCHES, _SCALED, _SPELLED, _scales_maps),
    Operator("BoundDiv", "quotient", MATRIX, f"{_PATCHES_FAIL}; by a constant: {_OWN}"),
    Operator("BoundLeakyRelu", "LeakyReLU", MATRIX, "not proven between patches"),
    Operator(
        "BoundSigmoid", "Sigmoid", MATRIX, "auto_LiRPA's slopes, with offsets in closed form (bounds/s_shaped.py)"
    ),
    Operator("BoundTanh", "Tanh", MATRIX, _LINES),
)
"""First row that fits decides."""


def verdict(node: Any) -> tuple[str, Operator | None]:
    """(mode, row) of a node."""
    for row in OPERATORS:
        if row.fits(node):
            return row.mode, row
    return UNKNOWN, None


_UNREADABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "Conv1d": (("0.3",), "take auto_LiRPA 0.7.1, or Conv2d on maps of height 1"),
    "Conv3d": ((), "no version reads volumes; take Conv2d with the depth among the channels"),
    "Dropout": ((), "put nn.Identity in its place"),
    "GELU": ((), "take ReLU, Sigmoid or Tanh"),
    "GroupNorm": ((), "take BatchNorm2d, whose statistics are constants"),
    "InstanceNorm1d": ((), "take BatchNorm1d, whose statistics are constants"),
    "InstanceNorm2d": ((), "take BatchNorm2d, whose statistics are constants"),
    "ConvTranspose1d": ((), "take ConvTranspose2d on maps of height 1"),
    "ConvTranspose2d": ((), "only without output_padding, dilation and groups, of equal stride and padding"),
    "MaxPool1d": ((), "take MaxPool2d on maps of height 1"),
    "AvgPool1d": ((), "take AvgPool2d on maps of height 1"),
    "AdaptiveAvgPool1d": ((), "take AdaptiveAvgPool2d(1) on maps of height 1, or x.mean(2)"),
}
"""Layers that these versions of auto_LiRPA (empty: all) fail on while they read a net, and what to do instead."""


def unreadable(layer: str) -> str | None:
    """What to do where a net with such a layer cannot be read; None: nothing is known."""
    versions, remedy = _UNREADABLE.get(layer, (("none",), ""))
    return remedy if not versions or library in versions else None


_NO_SLOPES = ("BoundSigmoid", "BoundTanh", "BoundMaxPool", "BoundMul", "BoundDiv")


def optimisable(bounded: Any) -> bool:
    """Whether alpha-CROWN is proven on nets of these nodes: its only choices are the slopes of ReLUs."""
    nodes = [node for node in bounded.children() if not is_elementwise(node)]
    kinds = {type(node).__name__ for node in nodes if verdict(node)[0] == UNKNOWN or moves(node)}
    known = {row.kind for row in OPERATORS}
    return kinds <= known and not kinds & set(_NO_SLOPES)


def table() -> str:
    """The rows as a Markdown table, for docs/design.md."""
    lines = ["| operator | layers | sound in | why |", "|---|---|---|---|"]
    shown = {PATCHES: "patches, matrix", MATRIX: "matrix", REFUSED: "none: refused"}
    for row in OPERATORS:
        mode = shown[row.mode] + (f" ({', '.join(row.versions)})" if row.versions else "")
        lines.append(f"| {row.kind.removeprefix('Bound')} | {row.layers} | {mode} | {row.reason} |")
    return "\n".join(lines)
