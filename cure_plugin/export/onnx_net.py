"""One self-contained ONNX file per net, from {Conv, Relu, Flatten, Reshape, Gemm} only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from cure_plugin.errors import SpecError
from cure_plugin.modes import evaluation_mode
from cure_plugin.nets import Normalize, Reshape
from cure_plugin.vnncomp.graphs import make_model, write_model

_PARITY = 1e-4
"""By how much outputs may differ from PyTorch's, relative to the largest where that is above 1."""


def export_onnx(net: nn.Sequential, input_shape: tuple[int, ...], path: str | Path) -> None:
    """Write ``net`` to ``path`` as :func:`onnx_model` makes it.

    Raises:
        SpecError: see :func:`onnx_model`.
        OutputError: the file cannot be written.
    """
    write_model(onnx_model(net, input_shape), path)


def onnx_model(net: nn.Sequential, input_shape: tuple[int, ...]) -> onnx.ModelProto:
    """``net`` (as it is in eval mode) with input ``X`` (1, *input_shape) and output ``Y``.

    BatchNorm is folded into the convolution or linear layer before it (a BatchNorm on the input becomes
    a 1 x 1 convolution), all weights lie inside the model, and it passes ``onnx.checker``.

    Raises:
        SpecError: a layer with no translation, weights that are not finite (the message names the layer), a net that
            does not map ``input_shape`` to (1, classes), or one that does more than its layers' types say.
    """
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    current = "X"
    layers = fold_batch_norm(net)
    for number, layer in enumerate(layers):
        output = "Y" if number == len(layers) - 1 else f"h{number}"
        kind, attributes, parameters = _translate(layer)
        names = [f"{name}{number}" for name in parameters]
        tensors += [
            numpy_helper.from_array(_stored(value, layer), name)
            for name, value in zip(names, parameters.values(), strict=True)
        ]
        nodes.append(helper.make_node(kind, [current, *names], [output], name=f"{kind}_{number}", **attributes))
        current = output
    x, outputs = _probed(net, input_shape)
    model = make_model(nodes, tensors, (1, *input_shape), outputs.shape[1])
    _compare(model, x, outputs)
    return model


def _probed(net: nn.Sequential, input_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(a random input, what the net makes of it), float32."""
    first = next(net.parameters(), torch.zeros(()))
    x = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with evaluation_mode(net), torch.no_grad():
            outputs = net(x.to(first)).float().cpu()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"the net does not take inputs of shape {input_shape}: {reason}") from error
    if len(net) == 0 or outputs.ndim != 2:
        raise SpecError(
            f"the net maps an input to shape {tuple(outputs.shape)}; it must end in (1, classes), e.g. Flatten, Linear"
        )
    return x.numpy(), outputs.numpy()


def _compare(model: onnx.ModelProto, x: np.ndarray, outputs: np.ndarray) -> None:
    """Refuse a model that computes something else: hooks and forwards of their own do not show in a layer's type."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    difference = float(np.abs(session.run(None, {"X": x})[0] - outputs).max())
    if not difference <= _PARITY * max(1.0, float(np.abs(outputs).max())):
        raise SpecError(
            f"the exported net's outputs differ from PyTorch's by {difference:.2g}: a layer does more than its type "
            "says (a hook, a forward of its own), or runs in half precision; export plain float32 layers"
        )


def fold_batch_norm(net: nn.Sequential) -> list[nn.Module]:
    """The layers of ``net`` with every BatchNorm merged into its predecessor, computed in float64."""
    layers: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            scale, shift = _batch_norm_affine(layer)
            previous = layers[-1] if layers else None
            if isinstance(previous, nn.Conv2d | nn.Linear):
                layers[-1] = _scaled_outputs(previous, scale, shift)
            elif previous is None and isinstance(layer, nn.BatchNorm2d):
                layers.append(_as_convolution(scale, shift))
            else:
                raise SpecError(f"cannot fold {layer} after {previous}; put BatchNorm after a Conv2d or Linear")
        elif not isinstance(layer, nn.Identity | nn.Dropout):
            layers.append(layer)
    return layers


def _batch_norm_affine(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(factor, shift) per channel of a BatchNorm in eval mode, float64."""
    if layer.running_mean is None or layer.running_var is None:
        raise SpecError(f"{layer} keeps no running statistics; it cannot be exported")
    ones = torch.ones_like(layer.running_mean)
    weight = ones if layer.weight is None else layer.weight.detach()
    bias = 0 * ones if layer.bias is None else layer.bias.detach()
    factor = weight.double() / (layer.running_var.double() + layer.eps).sqrt()
    return factor, bias.double() - layer.running_mean.double() * factor


def _scaled_outputs(layer: nn.Conv2d | nn.Linear, scale: Tensor, shift: Tensor) -> nn.Module:
    """A copy of ``layer`` whose outputs are multiplied by ``scale`` and moved by ``shift``."""
    weight = layer.weight.detach().double()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().double()
    folded: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        folded = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            padding_mode=layer.padding_mode,
        )
    else:
        folded = nn.Linear(layer.in_features, layer.out_features)
    folded.to(layer.weight.device)
    with torch.no_grad():
        folded.weight.copy_(weight * scale.view(-1, *[1] * (weight.ndim - 1)))
        assert folded.bias is not None
        folded.bias.copy_(bias * scale + shift)
    return folded


def _as_convolution(scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """A 1 x 1 convolution that scales and shifts each channel."""
    layer = nn.Conv2d(len(scale), len(scale), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(scale)[:, :, None, None])
        assert layer.bias is not None
        layer.bias.copy_(shift)
    return layer


def _translate(layer: nn.Module) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(operator, attributes, parameters) of one layer."""
    if isinstance(layer, Normalize):
        return "Conv", {"kernel_shape": [1, 1]}, {"W": layer.weight, "B": layer.bias}
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise SpecError(f"cannot export {layer}: padding must be numbers, filled with zeros")
        attributes = {
            "kernel_shape": list(layer.kernel_size),
            "strides": list(layer.stride),
            "pads": [*layer.padding, *layer.padding],
            "dilations": list(layer.dilation),
            "group": layer.groups,
        }
        return "Conv", attributes, _parameters(layer)
    if isinstance(layer, nn.Linear):
        return "Gemm", {"transB": 1}, _parameters(layer)
    if isinstance(layer, nn.ReLU):
        return "Relu", {}, {}
    if isinstance(layer, nn.Flatten):
        return "Flatten", {"axis": 1}, {}
    if isinstance(layer, Reshape):
        return "Reshape", {}, {"S": torch.tensor([-1, *layer.shape])}
    raise SpecError(
        f"cannot export layer {type(layer).__name__}; supported in nn.Sequential: Normalize, Conv2d, BatchNorm, "
        "Linear, ReLU, Flatten"
    )


def _stored(value: Tensor, layer: nn.Module) -> np.ndarray:
    """Weights as float32, shapes as they are."""
    if not bool(torch.isfinite(value).all()):
        raise SpecError(f"cannot export {layer}: its weights (or a BatchNorm folded into them) are not finite")
    value = value.detach().cpu().contiguous()
    return np.asarray(value.float().numpy() if value.is_floating_point() else value.numpy())


def _parameters(layer: nn.Conv2d | nn.Linear) -> dict[str, Tensor]:
    return {"W": layer.weight} if layer.bias is None else {"W": layer.weight, "B": layer.bias}
