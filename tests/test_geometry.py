"""Image transformations against forward matrices and grid_sample; hulls and planes against sampled parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.sets.geometric import planes
from cure_plugin.sets.geometric.hull import interval_hull
from cure_plugin.sets.geometric.parameters import parameter_names, parse_transformation
from cure_plugin.sets.geometric.planes import linear_planes
from cure_plugin.sets.geometric.sources import sinusoid_range
from cure_plugin.sets.geometric.transforms import transform

TOLERANCE = 1e-5
DEFAULT_PIECES = 4

SOUNDNESS_CASES = {
    "rotation": ("R(10)", 4),
    "shifted rotation": ("R(30,31)", 2),
    "rotation across its extrema": ("R(95)", 3),
    "rotation by more than a turn": ("R(-100,300)", 1),
    "translation": ("T(1.5,0.7)", 2),
    "scaling": ("Sc(10)", 3),
    "large scaling": ("Sc(-80,300)", 3),
    "shear": ("Sh(20)", 3),
    "large shear": ("Sh(-150,90)", 1),
    "contrast": ("C(30)", 1),
    "contrast that may invert": ("C(-250,20)", 1),
    "brightness": ("B(0.1)", 1),
    "composition of two": ("R(2) Sh(2)", 3),
    "composition with values": ("Sc(1) R(1) C(1) B(0.001)", 3),
    "values in the other order": ("B(0.2) Sh(5) C(40)", 3),
    "everything": ("Sc(5) R(3) T(1,0.5) Sh(3) C(20) B(0.1)", 2),
    "everything, other order": ("Sh(20) T(1,0.5) R(40) Sc(20)", (1, 1, 1, 3, 2)),
    "two rotations": ("R(20) Sh(10) R(5,130) T(1,1) R(10)", 1),
    "no width": ("R(5,5) T(0,0)", 2),
}


def boxes(text: str, batch: int, dtype: torch.dtype = torch.float32) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """The names and the box of ``text`` for every sample, narrower from sample to sample."""
    names, low, high = parse_transformation(text)
    share = torch.linspace(1, 0.5, batch, dtype=dtype).unsqueeze(1)
    lower, upper = torch.tensor([low], dtype=dtype), torch.tensor([high], dtype=dtype)
    middle = (lower + upper) / 2
    return names, torch.maximum(lower, middle + (lower - middle) * share), middle + (upper - middle) * share


def noise(batch: int = 3, channels: int = 2, height: int = 7, width: int = 6) -> Tensor:
    """Images of both signs with exact zeros and ones."""
    image = torch.randn(batch, channels, height, width)
    image[image.abs() < 0.2] = 0
    image[image > 1] = 1
    return image


def digits(count: int) -> Tensor:
    return load_data("mnist-slice", False).batch(slice(0, count))[0]


def sampled(lower: Tensor, upper: Tensor, count: int) -> Tensor:
    """(count, B, D) parameters in the box, every other coordinate pushed to an end now and then."""
    share = torch.rand(count, *lower.shape, dtype=lower.dtype)
    pushed = torch.rand(share.shape)
    share[pushed < 0.15] = 0
    share[pushed > 0.85] = 1
    return torch.minimum(torch.maximum(lower + share * (upper - lower), lower), upper)


def warped(image: Tensor, names: tuple[str, ...], parameters: Tensor) -> Tensor:
    """(count, B, C, H, W): the image under each of (count, B, D) parameters, in one batch."""
    count = parameters.shape[0]
    repeated = image.expand(count, *image.shape).flatten(0, 1)
    return transform(repeated, names, parameters.flatten(0, 1)).unflatten(0, (count, image.shape[0]))


def forward_matrix(name: str, values: list[float]) -> Tensor:
    """The 3 x 3 matrix that moves points forward; the identity for pixel values."""
    matrix = torch.eye(3, dtype=torch.float64)
    if name == "R":
        c, s = math.cos(math.radians(values[0])), math.sin(math.radians(values[0]))
        matrix[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    elif name == "T":
        matrix[:2, 2] = torch.tensor(values, dtype=torch.float64)
    elif name == "Sc":
        matrix[0, 0] = matrix[1, 1] = 1 + values[0] / 100
    elif name == "Sh":
        matrix[0, 1] = values[0] / 100
    return matrix


def reference(image: Tensor, names: tuple[str, ...], parameters: list[float]) -> Tensor:
    """One image through the inverse of the product of forward matrices and torch's grid_sample."""
    left, product, value_steps = list(parameters), torch.eye(3, dtype=torch.float64), []
    for name in names:
        values = [left.pop(0) for _ in range(2 if name == "T" else 1)]
        product = forward_matrix(name, values) @ product
        value_steps.append((name, values[0]))
    height, width = image.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = columns - (width - 1) / 2, (height - 1) / 2 - rows
    points = torch.stack([x, y, torch.ones_like(x)]).double().flatten(1)
    u, v, _ = torch.linalg.inv(product) @ points
    grid = torch.stack([2 * u / (width - 1), -2 * v / (height - 1)], -1).view(1, height, width, 2)
    result = torch.nn.functional.grid_sample(image.double(), grid, padding_mode="zeros", align_corners=True)
    for name, value in value_steps:
        if name == "C":
            result = result * (1 + value / 100)
        elif name == "B":
            result = result + value
    return result


# -- the transformation itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["R(1)", "T(1,1)", "Sc(1)", "Sh(1)", "C(1)", "B(1)", "Sc(1) R(1) T(1,1) Sh(1) C(1) B(1)"]
)
def test_identity_at_zero(text: str) -> None:
    names, lower, _ = parse_transformation(text)
    image = noise()
    assert torch.equal(transform(image, names, torch.zeros(3, len(lower))), image)


@pytest.mark.parametrize("right, up", [(1, 0), (0, 1), (-2, 3), (9, 0), (0, -1)])
def test_integer_translation_shifts_and_fills_with_zero(right: int, up: int) -> None:
    image = noise()
    height, width = image.shape[2:]
    expected = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i + up < height and 0 <= j - right < width:
                expected[:, :, i, j] = image[:, :, i + up, j - right]
    assert torch.equal(transform(image, ("T",), torch.tensor([[float(right), float(up)]] * 3)), expected)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_are_counter_clockwise(side: int, quarters: int) -> None:
    image = noise(height=side, width=side)
    turned = transform(image, ("R",), torch.full((3, 1), 90.0 * quarters))
    torch.testing.assert_close(turned, torch.rot90(image, quarters, (2, 3)), atol=1e-6, rtol=0)


def test_scaling_by_two_doubles_distances() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 6] = 1  # x = 2, y = 2
    moved = transform(image, ("Sc",), torch.tensor([[100.0]]))
    assert moved[0, 0, 0, 8] == 1 and moved[0, 0, 1, 8] == 0.5


def test_shear_moves_the_upper_half_right() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 4] = 1  # x = 0, y = 2
    assert transform(image, ("Sh",), torch.tensor([[100.0]]))[0, 0, 2, 6] == 1


@pytest.mark.parametrize("text", [text for text, _ in SOUNDNESS_CASES.values()])
def test_transform_equals_forward_matrices(text: str) -> None:
    image = noise(batch=1).double()
    names, lower, upper = boxes(text, 1, torch.float64)
    for parameters in sampled(lower, upper, 10):
        expected = reference(image, names, parameters[0].tolist())
        torch.testing.assert_close(transform(image, names, parameters), expected, atol=1e-9, rtol=0)


def test_first_listed_is_applied_first() -> None:
    image = noise(batch=1, height=7, width=7)
    turn, shift = torch.tensor([[90.0]]), torch.tensor([[1.0, 0.0]])
    one_by_one = transform(transform(image, ("R",), turn), ("T",), shift)
    together = transform(image, ("R", "T"), torch.cat([turn, shift], 1))
    other = transform(image, ("T", "R"), torch.cat([shift, turn], 1))
    centre = (slice(None), slice(None), slice(2, 5), slice(2, 5))
    torch.testing.assert_close(together[centre], one_by_one[centre], atol=1e-5, rtol=0)
    assert (other - together).abs().max() > 0.1


def test_contrast_and_brightness_keep_their_order_and_reach_padding() -> None:
    image = torch.full((1, 1, 3, 3), 0.5)
    away = torch.tensor([[9.0, 9.0]])
    contrast, brightness = torch.tensor([[100.0]]), torch.tensor([[0.1]])
    first = transform(image, ("T", "C", "B"), torch.cat([away, contrast, brightness], 1))
    last = transform(image, ("B", "C", "T"), torch.cat([brightness, contrast, away], 1))
    torch.testing.assert_close(first, torch.full_like(image, 0.1))
    torch.testing.assert_close(last, torch.full_like(image, 0.2))


def test_gradients_match_finite_differences() -> None:
    names, lower, upper = boxes("Sc(10) R(10) T(1,1) Sh(10) C(20) B(0.1)", 2, torch.float64)
    image = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    parameters = sampled(lower * 0.9 + 0.01, upper * 0.9, 1)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda p: transform(image, names, p), parameters, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x: transform(x, names, parameters.detach()), image.clone().requires_grad_(), atol=1e-5
    )


# -- soundness ---------------------------------------------------------------------------------


def assert_sound(image: Tensor, text: str, pieces: int | tuple[int, ...], count: int) -> None:
    names, lower, upper = boxes(text, image.shape[0], image.dtype)
    parameters = sampled(lower, upper, count)
    low, high = interval_hull(image, names, lower, upper, pieces)
    lower_slope, lower_offset, upper_slope, upper_offset = linear_planes(image, names, lower, upper, pieces)
    centre = (lower + upper) / 2
    for part in parameters.split(500):
        pixels = warped(image, names, part)
        assert (pixels >= low - TOLERANCE).all()
        assert (pixels <= high + TOLERANCE).all()
        offset = part - centre
        below = lower_offset + torch.einsum("nbd,bdchw->nbchw", offset, lower_slope)
        above = upper_offset + torch.einsum("nbd,bdchw->nbchw", offset, upper_slope)
        assert (pixels >= below - TOLERANCE).all()
        assert (pixels <= above + TOLERANCE).all()


@pytest.mark.parametrize("case", SOUNDNESS_CASES)
def test_bounds_hold_on_noise(case: str) -> None:
    assert_sound(noise(), *SOUNDNESS_CASES[case], count=2000)


@pytest.mark.parametrize("case", SOUNDNESS_CASES)
def test_bounds_hold_on_digits(case: str) -> None:
    assert_sound(digits(2), *SOUNDNESS_CASES[case], count=1000)


def test_bounds_hold_to_rounding_in_double_precision() -> None:
    image = noise(height=5, width=5).double()
    names, lower, upper = boxes("Sc(8) R(7) Sh(9)", 3, torch.float64)
    low, high = interval_hull(image, names, lower, upper, 2)
    pixels = warped(image, names, sampled(lower, upper, 3000))
    assert (pixels >= low).all() and (pixels <= high).all()


@pytest.mark.parametrize("width", [0.0, 1e-14])
def test_parameters_without_width_get_no_slope(width: float) -> None:
    """A grid over a range of hardly any width must not divide the rounding of its edges by itself."""
    image = noise(batch=20, height=4, width=4).double()
    lower = 20 * torch.randn(20, 2, dtype=torch.float64)
    upper = lower + torch.tensor([width, 3.0], dtype=torch.float64)
    lower_slope, lower_offset, upper_slope, upper_offset = linear_planes(image, ("R", "Sh"), lower, upper, 3)
    assert not lower_slope[:, 0].any() and not upper_slope[:, 0].any()
    assert lower_slope[:, 1].any() and upper_slope[:, 1].any()
    low, high = interval_hull(image, ("R", "Sh"), lower, upper, 3)
    assert (lower_offset >= low - 1e-9).all() and (upper_offset <= high + 1e-9).all()


def test_sinusoid_range_is_exact() -> None:
    a, b = torch.randn(2, 500, dtype=torch.float64)
    start = 10 * torch.randn(500, dtype=torch.float64)
    stop = start + 4 * torch.rand(500, dtype=torch.float64)
    low, high = sinusoid_range(a, b, start, stop)
    angles = start + (stop - start) * torch.linspace(0, 1, 4001, dtype=torch.float64).unsqueeze(1)
    values = a * angles.cos() + b * angles.sin()
    assert (values.amin(0) >= low - 1e-9).all() and (values.amax(0) <= high + 1e-9).all()
    assert (values.amin(0) - low).max() < 1e-5 and (high - values.amax(0)).max() < 1e-5


# -- tightness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.25, 1.0])
@pytest.mark.parametrize("start", [0.0, 10.0, 30.0])
def test_rotation_hull_is_close_to_the_sampled_hull(start: float, width: float) -> None:
    image = digits(10)
    lower = torch.full((10, 1), start)
    low, high = interval_hull(image, ("R",), lower, lower + width, DEFAULT_PIECES)
    angles = lower + width * torch.linspace(0, 1, 400).view(-1, 1, 1)
    pixels = torch.cat([warped(image, ("R",), part) for part in angles.split(100)])
    truth = (pixels.amax(0) - pixels.amin(0)).mean()
    assert (high - low).mean() <= 1.1 * truth


@pytest.mark.parametrize("text", ["T(0.3,0)", "Sc(5)", "Sh(10)"])
def test_hull_of_one_parameter_converges_to_the_sampled_hull(text: str) -> None:
    image = digits(4)
    names, lower, upper = boxes(text, 4)
    low, high = interval_hull(image, names, lower, upper, 8)
    share = torch.linspace(0, 1, 200).view(-1, 1, 1)
    pixels = warped(image, names, lower + share * (upper - lower))
    truth = (pixels.amax(0) - pixels.amin(0)).mean()
    assert (high - low).mean() <= 1.1 * truth


def test_hull_of_values_is_exact() -> None:
    image = noise(batch=1)
    names, lower, upper = boxes("B(0.2) C(-250,20)", 1)
    low, high = interval_hull(image, names, lower, upper, 1)
    ends = [transform(image, names, torch.tensor([[b, c]])) for b in (-0.2, 0.2) for c in (-250.0, 20.0)]
    torch.testing.assert_close(low, torch.stack(ends).amin(0))
    torch.testing.assert_close(high, torch.stack(ends).amax(0))


def test_black_stays_black() -> None:
    low, high = interval_hull(torch.zeros(1, 1, 8, 8), ("R",), torch.tensor([[-30.0]]), torch.tensor([[30.0]]), 3)
    assert not low.any() and not high.any()


def test_more_pieces_are_never_looser() -> None:
    image = digits(2)
    names, lower, upper = boxes("R(2) Sh(2)", 2)
    widths = []
    for pieces in (1, 2, 4):
        low, high = interval_hull(image, names, lower, upper, pieces)
        widths.append((high - low).mean().item())
    assert widths[0] > widths[1] > widths[2]


def test_planes_of_brightness_are_exact() -> None:
    image = noise(batch=1)
    lower, upper = torch.tensor([[-0.1]]), torch.tensor([[0.3]])
    lower_slope, lower_offset, upper_slope, upper_offset = linear_planes(image, ("B",), lower, upper, 1)
    torch.testing.assert_close(lower_slope, torch.ones_like(lower_slope))
    torch.testing.assert_close(upper_slope, torch.ones_like(upper_slope))
    torch.testing.assert_close(lower_offset, image + 0.1)
    torch.testing.assert_close(upper_offset, image + 0.1)


def test_planes_are_closer_than_the_hull() -> None:
    image = digits(4)
    names, lower, upper = boxes("R(1.25)", 4)
    low, high = interval_hull(image, names, lower, upper, 10)
    _, lower_offset, _, upper_offset = linear_planes(image, names, lower, upper, 10)
    assert (upper_offset - lower_offset).mean() < 0.7 * (high - low).mean()


@pytest.mark.parametrize("text", ["R(30)", "T(1,1)", "Sc(2) R(2) C(20) B(0.01)"])
def test_planes_are_nowhere_looser_than_the_hull_on_average(text: str) -> None:
    image = digits(3)
    names, lower, upper = boxes(text, 3)
    low, high = interval_hull(image, names, lower, upper, 4)
    _, lower_offset, _, upper_offset = linear_planes(image, names, lower, upper, 4)
    assert (lower_offset >= low - 1e-6).all() and (upper_offset <= high + 1e-6).all()


def test_planes_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise()
    names, lower, upper = boxes("R(9) C(20)", 3)
    together = linear_planes(image, names, lower, upper, 3)
    monkeypatch.setattr(planes, "_CHUNK_ELEMENTS", 1)
    for whole, parts in zip(together, linear_planes(image, names, lower, upper, 3), strict=True):
        torch.testing.assert_close(whole, parts)


# -- text and refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, names, lower, upper",
    [
        ("R(10)", ("R",), [-10], [10]),
        ("R(5,10)", ("R",), [5], [10]),
        ("R(-3, -1)", ("R",), [-3], [-1]),
        ("R(2) Sh(2)", ("R", "Sh"), [-2, -2], [2, 2]),
        ("Sc(1) R(1) C(1) B(0.001)", ("Sc", "R", "C", "B"), [-1, -1, -1, -0.001], [1, 1, 1, 0.001]),
        ("T(2,3)", ("T",), [-2, -3], [2, 3]),
        ("  T(0,0)B(1e-3) ", ("T", "B"), [0, 0, -0.001], [0, 0, 0.001]),
    ],
)
def test_text_is_read(text: str, names: tuple[str, ...], lower: list[float], upper: list[float]) -> None:
    assert parse_transformation(text) == (names, lower, upper)
    assert len(parameter_names(names)) == len(lower)


@pytest.mark.parametrize("text", [text for text, _ in SOUNDNESS_CASES.values()])
def test_text_survives_a_round_trip(text: str) -> None:
    names, lower, upper = parse_transformation(text)
    ends = iter(zip(lower, upper, strict=True))
    terms = []
    for name in names:
        low, high = next(ends)
        terms.append(f"T({high},{next(ends)[1]})" if name == "T" else f"{name}({low},{high})")
    assert parse_transformation(" ".join(terms)) == (names, lower, upper)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "empty"),
        ("   ", "empty"),
        ("X(1)", "unknown name 'X'"),
        ("r(1)", "unknown name 'r'"),
        ("R(10,5)", "reversed"),
        ("R(-5)", "half-width >= 0"),
        ("T(-1,1)", "half-width >= 0"),
        ("T(2)", "two half-widths"),
        ("T(1,2,3,4)", "two half-widths"),
        ("R(1,2,3)", "lowest,highest"),
        ("R()", "numbers"),
        ("R(ten)", "numbers"),
        ("R(nan)", "finite"),
        ("B(inf)", "finite"),
        ("R 10", "cannot read 'R 10'"),
        ("R(10", "cannot read"),
        ("R(1), Sh(2)", "cannot read ', Sh"),
        ("Sc(100)", "99.9"),
    ],
)
def test_bad_text_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint.replace("(", r"\(")) as error:
        parse_transformation(text)
    assert repr(text) in str(error.value)


def test_bad_arguments_are_refused() -> None:
    image, one = noise(), torch.ones(3, 1)
    with pytest.raises(SpecError, match="at least one of"):
        transform(image, ("Q",), one)
    with pytest.raises(SpecError, match="at least one of"):
        transform(image, (), torch.ones(3, 0))
    with pytest.raises(SpecError, match=r"\(3, 2\)"):
        transform(image, ("T",), one)
    with pytest.raises(SpecError, match="finite"):
        transform(image, ("R",), one * math.nan)
    with pytest.raises(SpecError, match="Sc must"):
        interval_hull(image, ("Sc",), -100 * one, one, 2)
    with pytest.raises(SpecError, match="empty"):
        interval_hull(image, ("R",), one, -one, 2)
    with pytest.raises(SpecError, match="floating point"):
        interval_hull(image.to(torch.uint8), ("R",), one, one, 2)
    for pieces in (0, (2, 2), (), -1):
        with pytest.raises(SpecError, match="pieces"):
            linear_planes(image, ("R", "B"), torch.zeros(3, 2), torch.ones(3, 2), pieces)
