"""ONNX files of other hands: read and equal to onnxruntime, or refused by node with the reason."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import IMAGE, READ, Maker
from torch import nn

from cure_plugin import PerturbationLpBall
from cure_plugin.certification import Certifier
from cure_plugin.cli.options import load_model
from cure_plugin.errors import CheckpointError
from cure_plugin.export import export_onnx, read_network, read_onnx_net
from cure_plugin.vnncomp.replay import Network

CASES = [pytest.param(name, opset, id=f"{name}-{opset}") for name, (_, opsets) in READ.items() for opset in opsets]


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name, opset", CASES)
def test_what_is_read_equals_onnxruntime(name: str, opset: int, tmp_path: Path) -> None:
    path = saved(READ[name][0](Maker(opset)), tmp_path)
    read = read_network(path)
    reference = Network(path)
    assert math.prod(read.shape) == math.prod(reference.shape)
    double = name == "float64"
    assert all(p.dtype == (torch.float64 if double else torch.float32) for p in read.net.parameters())
    for point in np.random.default_rng(1).standard_normal((5, math.prod(read.shape))):
        x = torch.from_numpy(point).to(torch.float64 if double else torch.float32).view(1, *read.shape)
        with torch.no_grad():
            found = read.net(x)
            assert torch.allclose(read.net(torch.cat([x, x + 1]))[:1], found, atol=1e-5), "entries of a batch mix"
        assert found.ndim == 2
        if name == "final Softmax":
            assert read.normalised
            found = found.softmax(1)
        assert np.allclose(found[0].numpy(), reference(point), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in READ if name != "float64"])
def test_what_is_read_can_be_certified(name: str, tmp_path: Path) -> None:
    net, shape = read_onnx_net(saved(READ[name][0](Maker(READ[name][1][0])), tmp_path))
    x = torch.rand(2, *shape)
    verdicts, _ = Certifier(net, shape, ("CROWN",)).decide(x, net(x).argmax(1), PerturbationLpBall(math.inf, 1e-5))
    assert {verdict.status for verdict in verdicts} == {"proved"}


def test_chains_stay_chains(tmp_path: Path) -> None:
    for name in ("MatMul + Add", "BatchNormalization", "Sub, Div, Mul", "ACAS Xu", "Constant"):
        net, _ = read_onnx_net(saved(READ[name][0](Maker(13)), tmp_path))
        assert type(net) is nn.Sequential, name
        assert {type(layer) for layer in net} <= {nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten}, (name, net)


def test_compressed_files(tmp_path: Path) -> None:
    content = READ["MatMul + Add"][0](Maker(13)).SerializeToString()
    path = tmp_path / "net.onnx.gz"
    path.write_bytes(gzip.compress(content))
    net, shape = load_model(path)
    assert np.allclose(net(torch.ones(1, *shape)).detach()[0], Network(path)(np.ones(72)), atol=1e-5)
    path.write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(CheckpointError, match=r"net\.onnx\.gz"):
        load_model(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.onnx\.gz"):
        load_model(path)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = READ["MatMul + Add"][0](Maker(13))
    onnx.save_model(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    net, _ = read_onnx_net(path)
    assert np.allclose(net(torch.ones(1, 2, 6, 6)).detach()[0], Network(path)(np.ones(72)), atol=1e-5)
    (tmp_path / "net.data").unlink()
    with pytest.raises(CheckpointError, match=r"net\.onnx"):
        read_onnx_net(path)


def test_exporters_files(tmp_path: Path) -> None:
    """What this package writes comes back as the same layers."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)).eval()
    export_onnx(net, (2, 6, 6), tmp_path / "net.onnx")
    again, _ = read_onnx_net(tmp_path / "net.onnx")
    assert [type(layer) for layer in again] == [type(layer) for layer in net]
    for one, other in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def unknown(m: Maker) -> onnx.ModelProto:
    return m.model(m.linear(m("Erf", m("Flatten", "x")), 72))


def inner_softmax(m: Maker) -> onnx.ModelProto:
    return m.model(m.linear(m("Softmax", m("Flatten", "x"), axis=1), 72))


def spatial_softmax(m: Maker) -> onnx.ModelProto:
    return m.model(m("Softmax", m.conv("x", 2, 3), axis=1), sizes=(1, 3, 6, 6))


def argmax(m: Maker) -> onnx.ModelProto:
    return m.model(m("Cast", m("ArgMax", m.linear(m("Flatten", "x"), 72), axis=1), to=TensorProto.FLOAT), sizes=(1, 1))


def integer_weights(m: Maker) -> onnx.ModelProto:
    return m.model(m("MatMul", m("Flatten", "x"), m.stored(np.ones((72, 3)), np.int64)))


def integer_input(m: Maker) -> onnx.ModelProto:
    x = m("Cast", "x", to=TensorProto.FLOAT)
    model = m.model(_linear(m, x))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return model


def _linear(m: Maker, x: str) -> str:
    return m.linear(m("Flatten", x), 72)


def half_input(m: Maker) -> onnx.ModelProto:
    m.dtype = np.float16
    return m.model(_linear(m, "x"), kind=TensorProto.FLOAT16)


def two_inputs(m: Maker) -> onnx.ModelProto:
    model = m.model(m.linear(m("Flatten", m("Add", "x", "other")), 72))
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, IMAGE))
    return model


def two_outputs(m: Maker) -> onnx.ModelProto:
    model = m.model(_linear(m, "x"))
    model.graph.output.append(helper.make_tensor_value_info(m.nodes[0].output[0], TensorProto.FLOAT, [1, 72]))
    return model


def open_sizes(m: Maker) -> onnx.ModelProto:
    return m.model(m.linear(m("Flatten", m("GlobalAveragePool", m.conv("x", 2, 4))), 4), (1, 2, "H", "W"))


def no_input_reaches(m: Maker) -> onnx.ModelProto:
    return m.model(m("Constant", value=onnx.numpy_helper.from_array(np.ones((1, 3), np.float32))))


def training_dropout(m: Maker) -> onnx.ModelProto:
    return m.model(_linear(m, m("Dropout", "x", m.stored(0.5), m.stored(True, np.bool_))))


def reflecting_pad(m: Maker) -> onnx.ModelProto:
    return m.model(_linear(m, m.conv(m("Pad", "x", m.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), 2, 2, pad=0)))


def uneven_average(m: Maker) -> onnx.ModelProto:
    pool = m("AveragePool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    return m.model(m.linear(m("Flatten", pool), 18))


def foreign_domain(m: Maker) -> onnx.ModelProto:
    model = m.model(m.linear(m("FusedGelu", m("Flatten", "x"), domain="com.microsoft"), 72))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def not_finite(m: Maker) -> onnx.ModelProto:
    return m.model(m("MatMul", m("Flatten", "x"), m.stored(np.full((72, 3), np.nan))))


def moving_weight(m: Maker) -> onnx.ModelProto:
    flat = m("Flatten", "x")
    return m.model(m("MatMul", m("MatMul", flat, m("Transpose", flat, perm=[1, 0])), m.stored(m.random(1, 3))))


def batch_mixed(m: Maker) -> onnx.ModelProto:
    return m.model(m.linear(m("Flatten", m("Concat", "x", "x", axis=0)), 72), sizes=(2, 3))


def ancient(m: Maker) -> onnx.ModelProto:
    return m.model(_linear(m, "x"), ir=3, listed=True)


def misfit(m: Maker) -> onnx.ModelProto:
    return m.model(m.linear(m("Flatten", "x"), 71), sizes=(1, 3))


REFUSED: dict[str, tuple[Callable[[Maker], onnx.ModelProto], int, str]] = {
    "an unknown operator": (unknown, 13, r"Erf/1 .*Erf is not read"),
    "Softmax inside": (inner_softmax, 13, r"Softmax/1 .*not the net's end"),
    "Softmax over a part": (spatial_softmax, 13, r"Softmax/1 .*over a part"),
    "ArgMax": (argmax, 13, r"ArgMax/2 .*ArgMax is not read"),
    "integer weights": (integer_weights, 13, r"MatMul/1 .*int64"),
    "an integer input": (integer_input, 13, r"uint8"),
    "a half input": (half_input, 13, r"float16.*float32"),
    "two inputs": (two_inputs, 13, r"2 inputs \(x, other\)"),
    "two outputs": (two_outputs, 13, r"2 outputs"),
    "open sizes": (open_sizes, 13, r"\(1, 2, 'H', 'W'\)"),
    "an output that is constant": (no_input_reaches, 13, "does not depend on its input"),
    "Dropout in training": (training_dropout, 13, r"Dropout/0 .*training"),
    "a reflecting Pad": (reflecting_pad, 13, r"Pad/0 .*reflect"),
    "an average over uneven pads": (uneven_average, 13, r"AveragePool/0 .*count_include_pad"),
    "a foreign domain": (foreign_domain, 13, r"FusedGelu/1 .*com\.microsoft"),
    "weights that are not finite": (not_finite, 13, r"MatMul/1 .*not finite"),
    "a product of two inputs": (moving_weight, 13, r"MatMul/2 .*depend on the input"),
    "a batch that is mixed": (batch_mixed, 13, r"Concat/0 .*batch axis"),
    "an opset below 7": (ancient, 6, r"opset 6"),
    "weights that do not fit": (misfit, 13, r"net\.onnx"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_where_and_why(name: str, tmp_path: Path) -> None:
    make, opset, message = REFUSED[name]
    path = saved(make(Maker(opset)), tmp_path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_network(path)
    assert "net.onnx" in str(refusal.value) and "\n" not in str(refusal.value)


def test_damaged_files_are_one_line_each(tmp_path: Path) -> None:
    content = READ["residual Add"][0](Maker(13)).SerializeToString()
    path = tmp_path / "net.onnx"
    random = np.random.default_rng(0)
    damaged = [b"", b"\0" * 100, b"no net", content[:400], content[: len(content) // 2]]
    for _ in range(60):
        spoiled = bytearray(content)
        for place in random.integers(0, len(content), 3):
            spoiled[place] = int(random.integers(256))
        damaged.append(bytes(spoiled))
    for number, one in enumerate(damaged):
        path.write_bytes(one)
        said = "net.onnx"
        try:
            read_network(path)
        except CheckpointError as error:
            said = str(error)
        else:
            assert number >= 5  # changes of weights alone leave a net
        assert "\n" not in said and "net.onnx" in said, said


def test_a_file_that_its_reader_would_get_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cure_plugin.export import onnx_operators

    path = saved(READ["MaxPool"][0](Maker(12)), tmp_path)
    monkeypatch.setitem(onnx_operators.CONVERTERS, "Relu", lambda node: node.record(nn.Tanh(), node.moving(0)))
    with pytest.raises(CheckpointError, match="differ from onnxruntime's"):
        read_network(path)
