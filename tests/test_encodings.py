"""Every encoding of every set: points go in and come back, points outside stay out, outputs are PyTorch's."""

from __future__ import annotations

import functools
import random
import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import ResidualNet, small_net
from torch import Tensor

from cure_plugin import PerturbationPatch, PerturbationSet, PerturbationUnion
from cure_plugin.datasets import ImageData
from cure_plugin.errors import DataError, SpecError
from cure_plugin.export import Encoding, default_encoding, encode, encoding_names, onnx_model, read_onnx_net, read_query
from cure_plugin.export.abcrown import write_abcrown
from cure_plugin.export.files import export_instances
from cure_plugin.export.parity import RuntimeNet
from cure_plugin.sets import LpBallSpec, set_spec
from cure_plugin.vnncomp.fixed_point import float32_above, float32_below, rounded_down, rounded_up
from cure_plugin.vnncomp.graphs import write_model
from cure_plugin.vnncomp.property import Ball, Property
from cure_plugin.vnncomp.query import Query
from cure_plugin.vnncomp.vnnlib import vnnlib_text, write_vnnlib

NETS = ("plain", "normalize", "batch-norm", "conv-batch-norm", "linear", "residual")
SETS = {
    "linf=0.1": ("box", "boxes"),
    "l2=0.5": ("box", "ball", "distance"),
    "l1=1.0": ("box", "ball", "distance"),
    "R(10)": ("box", "boxes", "planes"),
    "R(2) Sc(2) C(3) B(0.01)": ("box", "planes"),
    "T(1,1)": ("boxes", "planes"),
    "C(10) B(0.1)": ("parameters", "planes", "box"),
    "B(0.2)": ("parameters",),
    "patch=3x3": ("box", "boxes", "patch"),
    "patch at one place": ("box", "boxes", "patch"),
    "union": ("box", "boxes"),
}
QUADRUPLES = [
    (front, image, text, encoding)
    for text, encodings in SETS.items()
    for encoding in encodings
    for front in NETS
    for image in range(3)
]
PART = random.Random(0).sample(QUADRUPLES, 200)


def built(text: str) -> PerturbationSet:
    if text == "patch at one place":
        return PerturbationPatch(2, 3, (4, 4, 1, 1))
    if text == "union":
        return PerturbationUnion([built("linf=0.05"), built("patch=2x2")])
    return set_spec(text).build()


@functools.cache
def exported(front: str) -> tuple[torch.nn.Module, onnx.ModelProto]:
    torch.manual_seed(0)
    net = ResidualNet().eval() if front == "residual" else small_net(front)
    return net, onnx_model(net, (1, 8, 8))


def outputs_of(encoding: Encoding, path: Path, points: list[np.ndarray]) -> np.ndarray:
    write_model(encoding.model, path)
    return RuntimeNet(path)(torch.from_numpy(np.stack(points))).double().numpy()


def beyond(encoding: Encoding, generator: np.random.Generator) -> list[np.ndarray]:
    """Points that leave the property by 1e-3: past the hull, and where there is a ball past its surface."""
    wanted = encoding.wanted
    low, high = wanted.hull()
    points = []
    for index in generator.integers(len(low), size=3):
        for end, sign in ((low, -1), (high, 1)):
            point = (low + high) / 2 if len(wanted.boxes) == 1 else wanted.boxes[0][0].copy()
            point[index] = end[index] + sign * 1e-3
            points.append(point)
    if len(wanted.boxes) > 1:  # inside the hull, but in no box
        for _ in range(50):
            point = low + generator.random(len(low)) * (high - low)
            if all(max((a - point).max(), (point - b).max()) > 1e-3 for a, b in wanted.boxes):
                points.append(point)
                break
    if wanted.ball is not None:
        direction = generator.normal(size=len(low))
        direction *= (wanted.ball.radius + 1e-3) / np.linalg.norm(direction)
        points.append(wanted.ball.centre + direction)
    return points


@pytest.mark.parametrize("part", range(8))
def test_points_of_the_set_satisfy_the_file_and_come_back(part: int, images: Tensor, tmp_path: Path) -> None:
    vnnlib = pytest.importorskip("vnnlib")
    torch_generator, generator = torch.Generator().manual_seed(part), np.random.default_rng(part)
    for front, number, text, name in PART[part::8]:
        net, model = exported(front)
        x, own = images[number : number + 1], built(text)
        label = int(net(x).argmax())
        encoding = encode(model, x[0], label, own, name)
        variables = [own.random_start(x, torch_generator) for _ in range(3)]
        seen = torch.cat([own.decode(x, variable) for variable in variables])
        points = [encoding.to_input(variable) for variable in variables]
        found = outputs_of(encoding, tmp_path / "net.onnx", points)
        assert np.abs(found[:, :3] - net(seen).detach().numpy()).max() < 1e-4, (text, name)
        for point, image in zip(points, seen, strict=True):
            assert float((encoding.to_image(point) - image).abs().max()) < 1e-5
        wrong, right = np.full(3, 0.0), np.full(3, 0.0)
        wrong[label - 1], right[label] = 1.0, 1.0
        for version in encoding.versions:
            text_of_file = vnnlib_text(encoding.wanted, version)
            if version == "2.0":
                vnnlib.parse_query_string(text_of_file)
            query = Query(text_of_file)
            for point, values in zip(points, found, strict=True):
                rest = values[3:]
                # a measured distance is a float32 number, and nothing is let off it
                assert query.satisfied(point, np.append(wrong, rest - 1e-5), 1e-5), (text, name, version)
                assert not query.satisfied(point, np.append(right, rest), 1e-5)
            for point in beyond(encoding, generator):
                assert not query.satisfied(point, np.append(wrong, 0 * rest)), (text, name, version)
        if encoding.wanted.limit is not None:
            too_far = np.append(wrong, encoding.wanted.limit.bound + 1e-3)
            assert not query.satisfied(points[0], too_far)


def test_the_measured_distance_is_the_distance(images: Tensor, tmp_path: Path) -> None:
    for text, measure in (("l2=0.5", lambda d: d.square().sum()), ("l1=1.0", lambda d: d.abs().sum())):
        encoding = encode(exported("plain")[1], images[0], 0, built(text), "distance")
        point = np.concatenate([images[0].flatten().double().numpy(), images[1].flatten().double().numpy()])
        (values,) = outputs_of(encoding, tmp_path / "net.onnx", [point])
        assert abs(values[3] - float(measure((images[1] - images[0]).double()))) < 1e-5


def test_exact_encodings_hold_nothing_but_the_set(images: Tensor) -> None:
    """Random points of the property stand for images of the set; inexact ones are called so."""
    generator = np.random.default_rng(0)
    for text, names in SETS.items():
        own = built(text)
        for name in names:
            encoding = encode(exported("plain")[1], images[0], 0, own, name)
            query = Query(vnnlib_text(encoding.wanted, encoding.versions[-1]))
            for lower, upper in encoding.wanted.boxes[:5]:
                point = lower + generator.random(len(lower)) * (upper - lower)
                image = encoding.to_image(point).float()
                values = np.zeros(encoding.wanted.outputs)
                if encoding.wanted.limit is not None:
                    moved = (image - images[:1]).double()
                    values[-1] = float(moved.square().sum() if text.startswith("l2") else moved.abs().sum())
                if encoding.exact and query.satisfied(point, values):
                    assert bool(own.contains(images[:1], image, 1e-4).all()), (text, name)
    inexact = {(text, name) for text, names in SETS.items() for name in names} - {
        (text, name)
        for text, names in SETS.items()
        for name in names
        if encode(exported("plain")[1], images[0], 0, built(text), name).exact
    }
    assert ("R(10)", "planes") in inexact and ("l2=0.5", "box") in inexact and ("patch=3x3", "boxes") not in inexact


@pytest.mark.parametrize("text, name, version", [("l2=0.01", "distance", "1.0"), ("l2=0.01", "ball", "2.0")])
def test_the_tolerance_of_a_small_ball_is_small(text: str, name: str, version: str, images: Tensor) -> None:
    """1e-4 of a squared radius of 1e-4 would be a ball of another size."""
    encoding = encode(exported("plain")[1], images[0], 0, built(text), name)
    query = Query(vnnlib_text(encoding.wanted, version))
    centre = images[0].flatten().double().numpy()
    for radius, inside in ((0.009, True), (0.0101, False), (0.0135, False)):
        moved = centre + np.where(centre > 0.5, -1, 1) * radius / 8  # 64 pixels
        point = np.concatenate([centre, moved]) if name == "distance" else moved
        values = np.array([0.0, 1.0, 0.0] + [radius**2] * (name == "distance"))
        assert query.satisfied(point, values, 1e-4) == inside, radius


def test_one_network_serves_all_images_where_they_are_pinned(images: Tensor) -> None:
    _, model = exported("plain")
    for text, name in (("l2=0.5", "distance"), ("l1=1.0", "distance"), ("l1=1.0", "ball"), ("l2=0.5", "ball")):
        both = {encode(model, x, 0, built(text), name).model.SerializeToString(deterministic=True) for x in images[:2]}
        assert len(both) == 1, (text, name)


def test_chains_with_a_front_are_read_back(images: Tensor, tmp_path: Path) -> None:
    encoding = encode(exported("normalize")[1], images[0], 0, built("R(10)"), "planes")
    write_model(encoding.model, tmp_path / "net.onnx")
    net, shape = read_onnx_net(tmp_path / "net.onnx")
    point = torch.from_numpy(encoding.to_input(torch.tensor([[3.0]]))).float()[None]
    assert shape == (65,)
    assert np.allclose(net(point).detach(), RuntimeNet(tmp_path / "net.onnx")(point), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "inputs"),
    [("R(3)", 1), ("Sh(2) R(2) Sc(2) C(2) B(0.01)", 5), ("C(5) R(2)", 2), ("C(5) B(0.1)", 2), ("B(0.1) C(5)", 2)],
)
def test_pixels_that_stay_black_are_no_inputs_of_planes(text: str, inputs: int, images: Tensor) -> None:
    x, own = images[:1].clone(), built(text)
    x[..., :2], x[..., -2:], x[:, :, :2], x[:, :, -2:] = 0, 0, 0, 0
    encoding = encode(exported("plain")[1], x[0], 0, own, "planes")
    still = 64 - (encoding.wanted.shape[1] - inputs)
    assert still == 0 if text == "B(0.1) C(5)" else 20 <= still < 64
    low, high = encoding.wanted.hull()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        variable = own.random_start(x, generator)
        point = encoding.to_input(variable)
        assert bool(((low <= point) & (point <= high)).all())
        image = own.decode(x.double(), variable.double())
        assert float((encoding.to_image(point) - image).abs().max()) < 1e-7


def test_defaults_and_refusals(images: Tensor) -> None:
    _, model = exported("plain")
    wanted = {"linf=0.1": "box", "l2=0.5": "distance", "R(10)": "planes", "B(0.2)": "parameters", "patch=3x3": "boxes"}
    assert {text: default_encoding(built(text)) for text in wanted} == wanted
    assert default_encoding(built("l1=1.0"), "2.0") == "ball"
    for text, name, message in (
        ("linf=0.1", "ball", "it is for l1 and l2 balls"),
        ("R(10)", "parameters", "use planes"),
        ("linf=0.1", "planes", "it is for geometric sets"),
        ("l2=0.5", "patch", "it is for patches"),
        ("l2=0.5", "sphere", "known: ball, box"),
    ):
        with pytest.raises(SpecError, match=message):
            encode(model, images[0], 0, built(text), name)
    with pytest.raises(SpecError, match=r"label must lie in 0 \.\. 2"):
        encode(model, images[0], 7, built("linf=0.1"))
    assert set(encoding_names()) == {name for names in SETS.values() for name in names}


def test_a_subclass_is_no_more_than_its_hull(images: Tensor) -> None:
    class Striped(PerturbationPatch):
        pass

    assert default_encoding(Striped(2, 2)) == "box"
    assert not encode(exported("plain")[1], images[0], 0, Striped(2, 2, (1, 1, 1, 1))).exact


@pytest.mark.parametrize("seed", range(3))
def test_numbers_go_outward(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=500) * 10.0 ** generator.integers(-14, 3, size=500)
    assert (float32_below(values) <= values).all() and (float32_above(values) >= values).all()
    for value in values:
        assert float(rounded_down(value)) <= value <= float(rounded_up(value))
        assert "e" not in rounded_up(value) and "." in rounded_up(value)


def test_compressed_files_are_the_same_bytes(tmp_path: Path) -> None:
    wanted = Property((1, 2), ((np.zeros(2), np.ones(2)),), 0, 2)
    for name in ("a", "b"):
        write_vnnlib(tmp_path / f"{name}.vnnlib.gz", wanted)
    assert (tmp_path / "a.vnnlib.gz").read_bytes() == (tmp_path / "b.vnnlib.gz").read_bytes()
    assert read_query(tmp_path / "a.vnnlib.gz").inputs == 2


SMALL = vnnlib_text(Property((1, 2), ((np.zeros(2), np.ones(2)),), 0, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: text + ")", "closes nothing"),
        (lambda text: "hello " + text, "outside parentheses"),
        (lambda text: text.replace("(assert (<= X_1 1.0))", ""), "no lower or no upper bound"),
        (lambda text: text.replace("X_1 1.0", "X_7 1.0"), "neither a number nor declared"),
        (lambda text: text.replace("declare-const", "declare-fun"), "unknown form"),
        (lambda text: text.replace("(<= X_1 1.0)", "(<= (+ X_0 X_1) 1.0)"), "several inputs together"),
        (lambda text: text.replace("(<= X_1 1.0)", "(<= (* X_0 X_1) 1.0)"), "not linear"),
        (lambda text: text.replace("(<= X_1 1.0)", "(<= X_1 Y_0)"), "or on inputs and outputs"),
        (lambda text: text.replace("(<= X_1 1.0)", "(<= (- X_1 X_1) 1.0)"), "on no variable"),
        (lambda text: text.replace("(<= X_1 1.0)", "(< X_1 1.0)"), "unknown assertion"),
        (lambda text: "(" * 200, "nested more than"),
        (lambda text: "", "declares no inputs"),
    ],
)
def test_broken_files_are_named(change: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib"
    path.write_text(change(SMALL))  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        read_query(path).cases()
    assert "p.vnnlib" in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_query(tmp_path / "none.vnnlib")
    (tmp_path / "p.vnnlib.gz").write_bytes(b"\x1f\x8b nonsense")
    with pytest.raises(DataError, match="cannot read"):
        read_query(tmp_path / "p.vnnlib.gz")
    with pytest.raises(DataError, match="2 inputs and 2 outputs"):
        Query(SMALL).satisfied(np.zeros(3), np.zeros(2))


def test_properties_that_make_no_sense_are_refused() -> None:
    box = (np.zeros(2), np.ones(2))
    for arguments, message in (
        ({"boxes": ()}, "at least one"),
        ({"boxes": ((np.zeros(3), np.ones(3)),)}, "have 2 entries"),
        ({"boxes": ((np.ones(2), np.zeros(2)),)}, "lower <= upper"),
        ({"boxes": ((np.zeros(2), np.array([1, np.nan])),)}, "finite"),
        ({"label": 2}, r"0 \.\. 1"),
        ({"outputs": 1}, "an output for each"),
    ):
        with pytest.raises(SpecError, match=message):
            Property(**{"shape": (1, 2), "boxes": (box,), "label": 0, "classes": 2, **arguments})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="knows no sums"):
        vnnlib_text(Property((1, 2), (box,), 0, 2, ball=Ball(np.zeros(2), 1.0)))
    with pytest.raises(SpecError, match="unknown VNNLIB version"):
        vnnlib_text(Property((1, 2), (box,), 0, 2), "3.0")


def test_balls_in_the_form_of_alpha_beta_crown(images: Tensor, tmp_path: Path) -> None:
    data = ImageData((images * 255).to(torch.uint8), torch.tensor([0, 1, 2]), 3)
    specs = [set_spec(text) for text in ("linf=0.1", "l2=0.5", "l1=8/255")]
    instances = export_instances(exported("plain")[0], data, specs, tmp_path, timeout=7)
    assert len(instances) == 9 and {one.timeout for one in instances} == {7}
    assert {path.name for path in (tmp_path / "abcrown").iterdir()} == {
        "data.py",
        "images.npz",
        "l1-8-255.yaml",
        "l2-0.5.yaml",
    }
    config = yaml.safe_load((tmp_path / "abcrown" / "l1-8-255.yaml").read_text())
    assert config["specification"] == {"type": "lp", "norm": 1, "epsilon": pytest.approx(8 / 255)}
    assert Path(config["model"]["onnx_path"]).is_file() and config["data"]["end"] == 3
    loader = runpy.run_path(str(tmp_path / "abcrown" / "data.py"))["data"]
    loaded = loader({"epsilon": 0.5, "norm": 2})
    assert torch.equal(loaded["X"], data.batch(slice(0, 3))[0]) and loaded["labels"].tolist() == [0, 1, 2]
    with pytest.raises(SpecError, match="is for l1 and l2 balls"):
        write_abcrown(tmp_path / "a.yaml", tmp_path / "onnx" / "model.onnx", data, specs[0].build(), 5)


def test_networks_are_written_once(images: Tensor, tmp_path: Path) -> None:
    data = ImageData((images * 255).to(torch.uint8), torch.tensor([0, 1, 2]), 3)
    instances = export_instances(exported("plain")[0], data, ["l1=1", "B(0.1)"], str(tmp_path))
    assert [one.onnx for one in instances].count(instances[0].onnx) == 3
    assert len(list((tmp_path / "onnx").iterdir())) == 1 + 1 + 3
    with pytest.raises(SpecError, match="timeout must be"):
        export_instances(exported("plain")[0], data, [], tmp_path, timeout=0)


def test_an_earlier_list_does_not_outlive_its_net(images: Tensor, tmp_path: Path) -> None:
    data = ImageData((images[:1] * 255).to(torch.uint8), torch.tensor([0]), 3)
    export_instances(exported("plain")[0], data, [set_spec("linf=0.1")], tmp_path)
    assert (tmp_path / "instances.csv").exists()
    export_instances(exported("normalize")[0], data, [], tmp_path)
    assert not (tmp_path / "instances.csv").exists()


def test_a_label_that_is_no_class_is_found_before_anything_is_written(images: Tensor, tmp_path: Path) -> None:
    data = ImageData((images * 255).to(torch.uint8), torch.tensor([0, 1, 3]), 4)
    with pytest.raises(SpecError, match="label 3 of image 2: the net has 3 classes"):
        export_instances(exported("plain")[0], data, [set_spec("linf=0.1")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_sets_of_similar_text_get_files_of_their_own(images: Tensor, tmp_path: Path) -> None:
    data = ImageData((images[:1] * 255).to(torch.uint8), torch.tensor([0]), 3)
    specs = [set_spec(text) for text in ("R(-5,10)", "R(5,10)", "l2=0.5")] + [LpBallSpec("l2", "0.5", None)]
    instances = export_instances(exported("plain")[0], data, specs, tmp_path)
    assert len({one.vnnlib for one in instances}) == 4
    ranges = [read_query(tmp_path / one.vnnlib).box() for one in instances[:2]]
    assert [(low[0], high[0]) for low, high in ranges] == [(-5, 10), (5, 10)]
    assert len(list((tmp_path / "abcrown").glob("*.yaml"))) == 2


def test_boxes_of_a_subclass_hold_all_of_it(images: Tensor) -> None:
    class Noisy(PerturbationPatch):
        """A patch, and a little noise everywhere."""

        def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
            low, high = super().box(x)
            return low - 0.1, high + 0.1

    own = Noisy(2, 2, (1, 2, 1, 2))
    for whole in (own, PerturbationUnion([own, built("linf=0.01")])):
        encoding = encode(exported("plain")[1], images[0], 0, whole, "boxes")
        point = (images[:1] + 0.09).flatten().double().numpy()
        assert Query(vnnlib_text(encoding.wanted)).satisfied(point, np.array([0.0, 1.0, 0.0]))


def test_corners_of_pixel_sets_satisfy_the_file_exactly(images: Tensor) -> None:
    for text in ("C(10) B(0.1)", "B(0.1) T(1,2) C(20)"):
        own = built(text)
        encoding = encode(exported("plain")[1], images[0], 0, own, "box")
        for end in (own.lower, own.upper):
            point = encoding.to_input(end[None])
            assert Query(vnnlib_text(encoding.wanted)).satisfied(point, np.array([0.0, 1.0, 0.0]), 1e-9)


def test_images_that_float32_cannot_hold_are_refused(images: Tensor) -> None:
    with pytest.raises(SpecError, match="float32 numbers"):
        encode(exported("plain")[1], images[0].double() + 1e-12, 0, built("linf=0.1"))
    per_sample = PerturbationPatch(1, 1, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    with pytest.raises(SpecError, match="differs per sample"):
        encode(exported("plain")[1], images[0], 0, per_sample)


def test_boxes_without_inputs_are_no_cases() -> None:
    low, high = (
        "(assert (or (and (<= X_0 0.2)) (and (>= X_0 0.9))))",
        "(assert (or (and (>= X_0 0.5)) (and (<= X_0 0.1))))",
    )
    cases = Query(SMALL + low + high).cases()
    assert sorted((case.lower[0], case.upper[0]) for case in cases) == [(0, 0.1), (0.9, 1)]
    with pytest.raises(DataError, match="not numbered"):
        Query(SMALL.replace("(declare-const X_0 Real)", "(declare-const X_5 Real)"))
