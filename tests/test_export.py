"""ONNX and VNNLIB: parity, outward rounding, an independent reader, and Marabou's verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ResidualNet, shifted_batch_norm, small_net
from onnxruntime import InferenceSession
from torch import Tensor, nn

from cure_plugin import PerturbationLpBall
from cure_plugin.certification import Certifier
from cure_plugin.errors import CheckpointError, DataError, OutputError, SpecError
from cure_plugin.export import Property, encode, export_onnx, onnx_model, read_onnx_net, read_query, write_vnnlib
from cure_plugin.export.marabou import ask_marabou
from cure_plugin.export.parity import RuntimeNet, parity
from cure_plugin.nets import NETS, NetSpec, build_net
from cure_plugin.vnncomp.query import Query
from cure_plugin.vnncomp.vnnlib import vnnlib_text


@pytest.mark.parametrize("front", ["plain", "normalize", "batch-norm", "conv-batch-norm", "linear"])
def test_parity_and_round_trip(front: str, images: Tensor, tmp_path: Path) -> None:
    net = small_net(front)
    path = tmp_path / "net.onnx"
    export_onnx(net, (1, 8, 8), path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert parity(net, path, images) < 1e-4
    assert {node.op_type for node in onnx.load(path).graph.node} <= {"Conv", "Relu", "Flatten", "Gemm"}
    again, shape = read_onnx_net(path)
    assert shape == (1, 8, 8) and torch.allclose(again(images), net(images), atol=1e-4)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_net_exports(name: str, batch_norm: bool, tmp_path: Path) -> None:
    shape = (3, 16, 16)
    net = build_net(NetSpec(name, shape, 10, batch_norm, (0.4, 0.5, 0.5), (0.2, 0.2, 0.2))).eval()
    export_onnx(net, shape, tmp_path / "net.onnx")
    assert parity(net, tmp_path / "net.onnx", torch.rand(2, *shape)) < 1e-4


def test_the_same_net_gives_the_same_bytes(tmp_path: Path) -> None:
    net = small_net("conv-batch-norm")
    for name in ("a", "b"):
        export_onnx(net, (1, 8, 8), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class Own(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def hooked() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda layer, inputs, output: output + 1)
    return layer


def behind(*layers: nn.Module, wide: int = 64) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(wide, 3))


class Clipped(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-6, 6))


def clipping(how: str) -> nn.Module:
    """A ReLU that ends at 20, which small inputs do not show."""
    layer = nn.ReLU()
    if how == "hook":
        layer.register_forward_hook(lambda layer, inputs, output: output.clamp(max=20))
    else:
        layer.forward = lambda x: x.clamp(0, 20)
    return layer


def linear(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), *layers, nn.Linear(64, 3))


OTHER_NETS = {
    "residual": ResidualNet,
    "tanh": lambda: behind(nn.Tanh()),
    "same": lambda: behind(nn.Conv2d(1, 1, 3, padding="same")),
    "norm behind ReLU": lambda: behind(nn.ReLU(), shifted_batch_norm(1)),
    "mirrored": lambda: behind(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), shifted_batch_norm(2), wide=128),
    "nested": lambda: behind(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())),
    "linear on rows": lambda: behind(nn.Linear(8, 8), nn.ReLU()),
    "own forward": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), Own()),
    "hooked": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3), hooked()),
    "hook that clips": lambda: linear(clipping("hook")),
    "forward that clips": lambda: linear(clipping("forward")),
    "chain that clips": lambda: Clipped(nn.Flatten(), nn.Linear(64, 3)),
}
NOT_READ = ("mirrored", "own forward")
"""Pad by mirroring and Abs."""


@pytest.mark.parametrize("name", OTHER_NETS)
def test_nets_that_are_no_plain_chain_are_exported_as_they_are(name: str, images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = OTHER_NETS[name]().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    path = tmp_path / "net.onnx"
    export_onnx(net, (1, 8, 8), path)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()) and net.training
    for scale in (1, 10, 300):
        expected = net.eval()(scale * (images - 0.5))
        found = RuntimeNet(path)(scale * (images - 0.5))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * scale), scale
    if name not in NOT_READ:
        again, shape = read_onnx_net(path)
        assert shape == (1, 8, 8) and torch.allclose(again(images), net(images), atol=1e-4)


def test_several_images_run_at_once(images: Tensor) -> None:
    """As verifiers do; a view by the batch's size is traced at a batch of one."""
    torch.manual_seed(0)
    net = ResidualNet().eval()
    model = onnx_model(net, (1, 8, 8))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"X": images.numpy()})[0])
    assert torch.allclose(found, net(images), atol=1e-4) and len(found) > 1


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * (2 if bool(x.sum() > 1) else 1)

    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.logcumsumexp(x.flatten(1), 1)[:, :3]

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1), x

    pooled = nn.AvgPool2d(2, divisor_override=3)
    for net, message in (
        (Decides(), "reads values of tensors"),
        (Sorts(), "cannot export Sorts.*logcumsumexp"),
        (Pair(), "must give a tensor of logits, got tuple"),
        (nn.Flatten(0), "must end in"),
        (behind(nn.Softplus(threshold=5)), "leaves out what a layer says"),
        (behind(pooled, wide=16), "leaves out what a layer says"),
        (behind(nn.LocalResponseNorm(2)), "its graph has branches"),
    ):
        with pytest.raises(SpecError, match=message):
            export_onnx(net, (1, 8, 8), tmp_path / "x.onnx")
    spoiled = small_net("plain")
    with torch.no_grad():
        next(spoiled.parameters()).fill_(math.nan)
    for net, message in (
        (nn.Sequential(), "must end in"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "must end in"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), "does not take inputs of shape"),
        (spoiled, "0.weight of the net holds NaN or infinite values"),
    ):
        with pytest.raises(SpecError, match=message):
            export_onnx(net, (1, 8, 8), tmp_path / "x.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export_onnx(small_net("plain"), (1, 8, 8), tmp_path / "file" / "x.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_parametrised_layers_fold(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3, padding=1))
    net = nn.Sequential(first, shifted_batch_norm(2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
    export_onnx(net, (1, 8, 8), tmp_path / "net.onnx")
    assert parity(net, tmp_path / "net.onnx", images) < 1e-4


def test_many_boxes_and_many_classes_are_read() -> None:
    names = [f"(declare-const Y_{i} Real)" for i in range(200)]
    boxes = " ".join(f"(and (>= X_0 {i}.0) (<= X_0 {i}.5))" for i in range(1000))
    rivals = " ".join(f"(and (>= Y_{i} Y_0))" for i in range(1, 200))
    text = "\n".join(["(declare-const X_0 Real)", *names, f"(assert (or {boxes}))", f"(assert (or {rivals}))"])
    cases = Query(text).cases()
    assert len(cases) == 1000 and len(cases[0].alternatives) == 199


def test_export_leaves_a_net_in_training_as_it_is(images: Tensor, tmp_path: Path) -> None:
    net = small_net("conv-batch-norm").train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export_onnx(net, (1, 8, 8), tmp_path / "net.onnx")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training
    assert parity(net.eval(), tmp_path / "net.onnx", images) < 1e-4


def test_the_reader_takes_other_hands_too() -> None:
    text = """\ufeff; written by someone else
    (set-logic QF_LRA) (declare-const X_0 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
    (assert (<= X_0 1.)) (assert (>= X_0 +.5)) (assert (= Y_0 2.5e-1)) (assert (or (and (<= (* Y_1 (- 2.0)) 3))))
    (check-sat)
    """
    query = Query(text.removeprefix("\ufeff"))
    (case,) = query.cases()
    assert (case.lower, case.upper) == (0.5, 1.0)
    assert query.satisfied(np.array([0.7]), np.array([0.25, -1.5]))
    assert not query.satisfied(np.array([0.7]), np.array([0.26, -1.5]))
    assert not query.satisfied(np.array([0.7]), np.array([0.24, -1.5]))
    assert not query.satisfied(np.array([0.7]), np.array([0.25, -1.6]))
    ((linear, other, last),) = case.alternatives
    assert (linear.coefficients, linear.bound) == ({0: 1.0}, 0.25)
    assert (other.coefficients, other.bound) == ({0: -1.0}, -0.25)
    assert (last.coefficients, last.bound) == ({1: -2.0}, 3.0)
    assert Query(text[1:] + "(assert (or))").cases() == []


def test_a_byte_order_mark_is_no_token(tmp_path: Path) -> None:
    text = vnnlib_text(Property((1, 1), ((np.zeros(1), np.ones(1)),), 0, 2))
    (tmp_path / "p.vnnlib").write_text("\ufeff" + text)
    assert read_query(tmp_path / "p.vnnlib").inputs == 1


def test_shapes_and_indices_with_blanks() -> None:
    text = """(vnnlib-version <2.0>)
    (declare-network N (declare-input X Real [1, 2]) (declare-output Y Real [1,1]))
    (assert (<= X[0, 1] 1.0)) (assert (>= X[0,1] 0.0)) (assert (<= X[0,0] 2.0)) (assert (>= X[0,0] 0.0))
    (assert (>= Y[0,0] 1.0))
    """
    assert Query(text).box()[1].tolist() == [2.0, 1.0]
    for old, new, message in (
        ("<2.0>", "<3.0>", "unknown form"),
        ("[1, 2]", "[99999, 99999]", "more than"),
        ("[1, 2]", f"[{'9' * 5000}]", "fixed size"),
    ):
        with pytest.raises(DataError, match=message):
            Query(text.replace(old, new))


def test_files_that_multiply_out_are_refused() -> None:
    inputs = range(20)
    lines = [f"(declare-const X_{i} Real)" for i in inputs] + ["(declare-const Y_0 Real)", "(assert (<= Y_0 0.0))"]
    lines += [f"(assert (or (and (>= X_{i} 0) (<= X_{i} 1)) (and (>= X_{i} 2) (<= X_{i} 3))))" for i in inputs]
    with pytest.raises(DataError, match="multiply out"):
        Query("\n".join(lines)).cases()
    with pytest.raises(DataError, match="unknown form"):
        Query(f"(declare-const X_{'9' * 5000} Real)")


def test_a_corrupt_onnx_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(small_net("plain"), (1, 8, 8), path)
    path.write_bytes(path.read_bytes()[:500])
    for reader in (read_onnx_net, RuntimeNet):
        with pytest.raises(CheckpointError, match=r"net\.onnx"):
            reader(path)
    with pytest.raises(CheckpointError, match=r"none\.onnx"):
        read_onnx_net(tmp_path / "none.onnx")


def evaluate_independently(path: Path, point: np.ndarray, logits: np.ndarray) -> bool:
    """Does (point, logits) satisfy the file? A tiny s-expression interpreter, no code of the package."""
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", path.read_text()))

    def parse(position: int) -> tuple[object, int]:
        if tokens[position] != "(":
            return tokens[position], position + 1
        items, position = [], position + 1
        while tokens[position] != ")":
            item, position = parse(position)
            items.append(item)
        return items, position + 1

    def value(item: object) -> float:
        assert isinstance(item, str)
        if item[0] in "XY":
            return float((point if item[0] == "X" else logits)[int(item[2:])])
        assert re.fullmatch(r"-?\d+\.\d+", item), item
        return float(item)

    def holds(item: object) -> bool:
        assert isinstance(item, list)
        if item[0] in ("and", "or"):
            return (all if item[0] == "and" else any)(holds(part) for part in item[1:])
        left, right = value(item[1]), value(item[2])
        return left <= right if item[0] == "<=" else left >= right

    position, verdict = 0, True
    while position < len(tokens):
        form, position = parse(position)
        assert isinstance(form, list)
        if form[0] == "assert":
            verdict = verdict and holds(form[1])
    return verdict


def box_property(image: Tensor, label: int, eps: float) -> Property:
    return encode(onnx_model(small_net("plain"), (1, 8, 8)), image, label, PerturbationLpBall(math.inf, eps)).wanted


@pytest.mark.parametrize("eps", [0.1, 1 / 255, 8 / 255, 1e-7, 0.0])
def test_vnnlib_never_shrinks_the_set(eps: float, images: Tensor, tmp_path: Path) -> None:
    ball = PerturbationLpBall(math.inf, eps)
    path = tmp_path / "p.vnnlib"
    wanted = box_property(images[0], 1, eps)
    write_vnnlib(path, wanted, comment="two\nlines")
    wins, loses = np.array([3.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0])
    lower, upper = ball.box(images[:1].double())
    for point in (lower, upper, images[:1].double(), ball.sample(images[:1].double())):
        flat = point.flatten().numpy()
        assert evaluate_independently(path, flat, wins) and not evaluate_independently(path, flat, loses)
    beyond = upper.flatten().numpy().copy()
    beyond[5] += 1e-3
    assert not evaluate_independently(path, beyond, wins)
    query = read_query(path)
    (again,) = query.cases()
    assert (query.inputs, query.outputs, len(again.alternatives)) == (64, 3, 2)
    assert bool((again.lower <= wanted.boxes[0][0]).all() and (again.upper >= wanted.boxes[0][1]).all())
    assert np.allclose(again.lower, wanted.boxes[0][0], atol=2e-12)


def test_marabou_agrees_on_a_proof_and_a_refutation(images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("maraboupy")
    net = small_net("normalize")
    export_onnx(net, (1, 8, 8), tmp_path / "net.onnx")
    label = int(net(images[:1]).argmax())
    y = torch.tensor([label])
    certifier = Certifier(net, (1, 8, 8))
    answers = {}
    for eps in (0.001, 0.3):
        ball = PerturbationLpBall(math.inf, eps)
        (verdict,), _ = certifier.decide(images[:1], y, ball)
        path = tmp_path / f"{eps}.vnnlib"
        write_vnnlib(path, box_property(images[0], label, eps))
        query = read_query(path)
        answer = ask_marabou(tmp_path / "net.onnx", query)
        answers[verdict.status] = answer.result
        if answer.counterexample is not None:
            logits = RuntimeNet(tmp_path / "net.onnx")(torch.from_numpy(answer.counterexample)[None])[0]
            assert query.satisfied(answer.counterexample, logits.numpy(), tolerance=1e-6)
    assert answers == {"proved": "unsat", "falsified": "sat"}


def test_marabou_is_not_believed_where_its_own_arithmetic_fails(images: Tensor, tmp_path: Path) -> None:
    """Ranges below 1e-5 make Marabou 2.0.0 call any query unsat; scaling or the bare-box query must save us."""
    pytest.importorskip("maraboupy")
    net = small_net("plain")
    with torch.no_grad():
        net[2].weight.mul_(1e-6)
    export_onnx(net, (1, 8, 8), tmp_path / "net.onnx")
    wrong = (int(net(images[:1]).argmax()) + 1) % 3
    query = Query(vnnlib_text(box_property(images[0], wrong, 0.01)))
    assert ask_marabou(tmp_path / "net.onnx", query).result != "unsat"


def test_marabou_refuses_a_misfit(tmp_path: Path) -> None:
    pytest.importorskip("maraboupy")
    export_onnx(small_net("plain"), (1, 8, 8), tmp_path / "net.onnx")
    query = Query(vnnlib_text(Property((1, 4), ((np.zeros(4), np.ones(4)),), 0, 3)))
    with pytest.raises(DataError, match="64 inputs to 3 outputs"):
        ask_marabou(tmp_path / "net.onnx", query)
    with pytest.raises(CheckpointError, match=r"none\.onnx"):
        ask_marabou(tmp_path / "none.onnx", query)


def altered(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_an_onnx_node_that_nothing_reads_changes_nothing(images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    net = small_net("linear")
    export_onnx(net, (1, 8, 8), path)

    def add_dangling(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node("Relu", ["Y"], ["Z"]))

    again, _ = read_onnx_net(altered(path, add_dangling))
    assert len(again) == len(net) and torch.allclose(again(images), net(images), atol=1e-5)


@pytest.mark.parametrize("number, message", [(0, "does not fit its input"), (1, "unusable weights")])
def test_onnx_weights_that_do_not_fit_are_refused(number: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(small_net("linear"), (1, 8, 8), path)

    def shorten(model: onnx.ModelProto) -> None:
        array = onnx.numpy_helper.to_array(model.graph.initializer[number])
        smaller = array[:, :-1] if array.ndim == 2 else array[:-1]
        tensor = onnx.numpy_helper.from_array(smaller.copy(), model.graph.initializer[number].name)
        model.graph.initializer[number].CopyFrom(tensor)

    with pytest.raises(CheckpointError, match=message):
        read_onnx_net(altered(path, shorten))


def test_double_precision_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(small_net("linear"), (1, 8, 8), path)

    def widen(model: onnx.ModelProto) -> None:
        array = onnx.numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64)
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, model.graph.initializer[0].name))

    with pytest.raises(CheckpointError, match=r"not float32|cannot read"):
        read_onnx_net(altered(path, widen))
