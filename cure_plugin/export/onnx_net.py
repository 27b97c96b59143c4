"""One self-contained ONNX file per net; of chains of layers from {Conv, Relu, Flatten, Reshape, Gemm} only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from cure_plugin.errors import SpecError, first_line
from cure_plugin.export.onnx_traced import traced_model
from cure_plugin.modes import evaluation_mode
from cure_plugin.nets import Normalize, Reshape
from cure_plugin.vnncomp.graphs import make_model, write_model

_INPUTS = 3
"""Random inputs compared, of pixels and of normally distributed values each."""

_PARITY = 1e-4
"""By how much outputs may differ from PyTorch's, relative to the largest where that is above 1."""


def export_onnx(net: nn.Module, input_shape: tuple[int, ...], path: str | Path) -> None:
    """Write ``net`` to ``path`` as :func:`onnx_model` makes it.

    Raises:
        SpecError: see :func:`onnx_model`.
        OutputError: the file cannot be written.
    """
    write_model(onnx_model(net, input_shape), path)


def onnx_model(net: nn.Module, input_shape: tuple[int, ...]) -> onnx.ModelProto:
    """``net`` (as it is in eval mode) with input ``X`` (1, *input_shape) and output ``Y``.

    Of a chain of layers that are known here, BatchNorm is folded into the convolution or linear layer before it (a
    BatchNorm on the input becomes a 1 x 1 convolution); any other net is as torch's exporter writes it. All weights lie
    inside the model, it passes ``onnx.checker``, and it computes what the net does, on onnxruntime.

    Raises:
        SpecError: weights that are not finite, a net that does not map ``input_shape`` to (1, classes), or whose
            forward reads values, or one that neither we nor torch's exporter can write (the message names the layer).
    """
    x, outputs = _probed(net, input_shape)
    try:
        return _same(_chain(net, (1, *input_shape), outputs.shape[-1]), x, outputs)
    except _OtherNetError:
        return _same(traced_model(net, input_shape, outputs.shape[-1]), x, outputs)


class _OtherNetError(SpecError):
    """What is not a chain of layers that are known here."""


def _chain(net: nn.Module, shape: tuple[int, ...], classes: int) -> onnx.ModelProto:
    """A chain of layers as ONNX.

    Raises:
        _OtherNetError: it is none.
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
    return make_model(nodes, tensors, shape, classes)


def _probed(net: nn.Module, input_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(some inputs, what the net makes of them one by one), float32."""
    first = next(net.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    shape = (_INPUTS, 1, *input_shape)
    x = torch.cat([torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)])
    try:
        with evaluation_mode(net), torch.no_grad():
            outputs = [net(one.to(first)).float().cpu() for one in x]
    except Exception as error:  # whatever a net of somebody else raises
        raise SpecError(f"the net does not take inputs of shape {input_shape}: {first_line(error)}") from error
    if outputs[0].ndim != 2 or (isinstance(net, nn.Sequential) and len(net) == 0):
        raise SpecError(
            f"the net maps an input to shape {tuple(outputs[0].shape)}; it must end in (1, classes), e.g. Flatten, "
            "Linear"
        )
    return x.numpy(), torch.stack(outputs).numpy()


def _same(model: onnx.ModelProto, x: np.ndarray, outputs: np.ndarray) -> onnx.ModelProto:
    """``model``, which computes ``outputs``.

    Raises:
        SpecError: ``outputs`` are not finite.
        _OtherNetError: it does not: hooks and forwards of their own do not show in a layer's type.
    """
    if not np.isfinite(outputs).all():
        raise SpecError("the net's outputs are not finite; look for NaN or infinity among its weights")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = np.stack([session.run(None, {"X": one})[0] for one in x])
    difference = float(np.abs(found - outputs).max())
    if not difference <= _PARITY * max(1.0, float(np.abs(outputs).max())):
        raise _OtherNetError(
            f"the exported net's outputs differ from PyTorch's by {difference:.2g}: its forward does not do the same "
            "at every call, or runs in half precision; export plain float32 layers"
        )
    return model


def fold_batch_norm(net: nn.Module) -> list[nn.Module]:
    """The layers of a chain with every BatchNorm merged into its predecessor, computed in float64.

    Raises:
        _OtherNetError: ``net`` is no chain, or a BatchNorm follows another layer.
    """
    if not isinstance(net, nn.Sequential):
        raise _OtherNetError(f"{type(net).__name__} is no nn.Sequential")
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
                raise _OtherNetError(f"cannot fold {layer} after {previous}; put BatchNorm after a Conv2d or Linear")
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
            raise _OtherNetError(f"cannot export {layer}: padding must be numbers, filled with zeros")
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
    raise _OtherNetError(
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
