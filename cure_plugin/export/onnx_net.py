"""One self-contained ONNX file per net; of chains of layers from {Conv, Relu, Flatten, Reshape, Gemm} only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from cure_plugin.errors import SpecError, first_line
from cure_plugin.export.onnx_traced import traced_model
from cure_plugin.inputs import check_weights, like, plain_net
from cure_plugin.nets import Normalize, Reshape
from cure_plugin.vnncomp.graphs import make_model, write_model

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
    try:
        own = copy.deepcopy(plain_net(net)).cpu().eval()  # forwards may leave something behind
    except Exception as error:  # torch copies no results of computations that have a gradient
        raise SpecError(f"the net cannot be copied ({first_line(error)}); detach the tensors that it keeps") from error
    check_weights(own)
    x, outputs = _probed(own, input_shape)
    try:
        return _same(_chain(own, (1, *input_shape), outputs.shape[-1]), x, outputs)
    except _OtherNetError:
        return _same(traced_model(own, input_shape, outputs.shape[-1]), x, outputs)


class _OtherNetError(SpecError):
    """What is not a chain of layers that are known here."""


def _probed(net: nn.Module, input_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs small and large, what the net makes of them one by one), float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, *input_shape)
    constants = torch.tensor([0.0, 1.0, 0.5, -1.0]).view(-1, *[1] * (len(shape) - 1)).expand(-1, *shape[1:])
    drawn = [scale * torch.randn(shape, generator=generator) for scale in (1, 6, 40)]
    x = torch.cat([constants, torch.rand(shape, generator=generator), *drawn])
    try:
        with torch.no_grad():
            outputs = [net(one.to(like(net))) for one in x]
    except Exception as error:  # whatever a net of somebody else raises
        raise SpecError(f"the net does not take inputs of shape {input_shape}: {first_line(error)}") from error
    if not isinstance(outputs[0], Tensor):
        raise SpecError(
            f"the net must give a tensor of logits, got {type(outputs[0]).__name__}; wrap it in one that does"
        )
    if outputs[0].ndim != 2 or len(outputs[0]) != 1 or (isinstance(net, nn.Sequential) and len(net) == 0):
        raise SpecError(
            f"the net maps an input to shape {tuple(outputs[0].shape)}; it must end in (1, classes), e.g. Flatten, "
            "Linear"
        )
    return x.numpy(), torch.stack(outputs).detach().float().numpy()


def _same(model: onnx.ModelProto, x: np.ndarray, outputs: np.ndarray) -> onnx.ModelProto:
    """``model``, which computes ``outputs``.

    Raises:
        SpecError: ``outputs`` are not finite.
        _OtherNetError: it does not: hooks and forwards of their own do not show in a layer's type.
    """
    if not np.isfinite(outputs).all():
        raise SpecError("the net's outputs are not finite; look for NaN or infinity among its weights")
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = np.stack([session.run(None, {"X": one})[0] for one in x])
    except Exception as error:  # onnxruntime's have no common class
        raise _OtherNetError(f"onnxruntime cannot run the exported net: {first_line(error)}") from error
    apart, largest = np.abs(found - outputs).max((1, 2)), np.abs(outputs).max((1, 2))
    if not (apart <= _PARITY * np.maximum(1.0, largest)).all():
        raise _OtherNetError(
            f"the exported net's outputs differ from PyTorch's by {apart.max():.2g}: torch's exporter leaves out what "
            "a layer says (as divisor_override, or threshold), or the net's forward does not do the same at every "
            "call, or runs in half precision; export plain float32 layers"
        )
    return model


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
    try:
        return make_model(nodes, tensors, shape, classes)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:  # as a Linear on images
        raise _OtherNetError(f"the layers do not fit together as ONNX has them: {first_line(error)}") from error


_KNOWN = (
    Normalize,
    Reshape,
    nn.Conv2d,
    nn.Linear,
    nn.ReLU,
    nn.Flatten,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Identity,
    nn.Dropout,
)


def _layers(net: nn.Module) -> list[nn.Module]:
    """Those of a chain, each of which does what its type says and no more.

    Raises:
        _OtherNetError: a net or layer that may do something else: of another type, with hooks or a forward of its own.
    """
    if type(net) is not nn.Sequential or _is_changed(net):
        raise _OtherNetError(f"{type(net).__name__} is no plain nn.Sequential")
    for layer in net:
        if type_before_parametrizations(layer) not in _KNOWN or _is_changed(layer):
            raise _OtherNetError(f"{layer} is no plain layer that is known here")
    return list(net)


def _is_changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def fold_batch_norm(net: nn.Module) -> list[nn.Module]:
    """The layers of a chain with every BatchNorm merged into its predecessor, computed in float64.

    Raises:
        _OtherNetError: ``net`` is no chain, or a BatchNorm follows another layer.
    """
    layers: list[nn.Module] = []
    for layer in _layers(net):
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
        raise _OtherNetError(f"{layer} keeps no running statistics")
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
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
        return "Flatten", {"axis": 1}, {}
    if isinstance(layer, Reshape):
        return "Reshape", {}, {"S": torch.tensor([-1, *layer.shape])}
    raise _OtherNetError(f"cannot export layer {layer} of a chain")


def _stored(value: Tensor, layer: nn.Module) -> np.ndarray:
    """Weights as float32, shapes as they are."""
    if not bool(torch.isfinite(value).all()):
        raise SpecError(f"cannot export {layer}: its weights (or a BatchNorm folded into them) are not finite")
    value = value.detach().cpu().contiguous()
    return np.asarray(value.float().numpy() if value.is_floating_point() else value.numpy())


def _parameters(layer: nn.Conv2d | nn.Linear) -> dict[str, Tensor]:
    return {"W": layer.weight} if layer.bias is None else {"W": layer.weight, "B": layer.bias}
