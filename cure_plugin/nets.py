"""The nets of the papers, as plain ``nn.Module`` objects built by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure_plugin.checks import check_shape
from cure_plugin.errors import SpecError


class Reshape(nn.Module):
    """Inputs (B, ...) as tensors (B, *shape), entries in their order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)

    def extra_repr(self) -> str:
        return str(self.shape)


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what is no normalisation.

    Raises:
        SpecError: lengths differ, a number that is not finite, or a std that is not positive.
    """
    if len(mean) != len(std) or not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise SpecError(f"mean and std need one number per channel, finite, std > 0; got mean={mean}, std={std}")


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel; for what traces it, as auto_LiRPA does, a 1 x 1 convolution with fixed weights.

    A subtraction and a division by buffers would say the same, but no auto_LiRPA version bounds those
    in patches mode, and verifiers read one more kind of node. As a convolution it takes 25 times as long (on CPUs).

    Args:
        mean: one number per channel.
        std: one number > 0 per channel.

    Raises:
        SpecError: lengths differ, or a std that is not positive.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        check_normalisation(mean, std)
        scale = 1 / torch.tensor(std, dtype=torch.get_default_dtype())
        self.register_buffer("weight", torch.diag(scale)[:, :, None, None])
        self.register_buffer("bias", -torch.tensor(mean, dtype=torch.get_default_dtype()) * scale)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or x.ndim != 4 or x.shape[1] != len(self.bias):
            return F.conv2d(x, self.weight, self.bias)
        return x * self.weight.sum(1) + self.bias[:, None, None]


@dataclass(frozen=True)
class NetSpec:
    """Which net, for which data.

    Attributes:
        name: one of :data:`NETS`.
        input_shape: (channels, height, width).
        classes: number of logits.
        batch_norm: BatchNorm after every hidden layer.
        mean, std: per-channel normalisation inside the net; none where ``mean`` is empty.
    """

    name: str
    input_shape: tuple[int, int, int]
    classes: int = 10
    batch_norm: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def cnn_tiny(spec: NetSpec) -> list[nn.Module]:
    """Conv 8 4x4 stride 2, conv 16 4x4 stride 2, linear 32: for files that must stay small."""
    return _conv_net(spec, [(8, 4, 2), (16, 4, 2)], 32)


def cnn_small(spec: NetSpec) -> list[nn.Module]:
    """Conv 16 4x4 stride 2, conv 32 4x4 stride 2, linear 100 (Wong and Kolter 2018)."""
    return _conv_net(spec, [(16, 4, 2), (32, 4, 2)], 100)


def cnn7(spec: NetSpec) -> list[nn.Module]:
    """Conv 3x3 of widths 64, 64, 128 (stride 2), 128, 128, then linear 512 (Shi et al. 2021)."""
    return _conv_net(spec, [(64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)], 512)


def cnn7_narrow(spec: NetSpec) -> list[nn.Module]:
    """cnn7 with half the channels and linear 216."""
    return _conv_net(spec, [(32, 3, 1), (32, 3, 1), (64, 3, 2), (64, 3, 1), (64, 3, 1)], 216)


NETS: dict[str, Callable[[NetSpec], list[nn.Module]]] = {
    "cnn_tiny": cnn_tiny,
    "cnn_small": cnn_small,
    "cnn7": cnn7,
    "cnn7_narrow": cnn7_narrow,
}


def build_net(spec: NetSpec, generator: torch.Generator | None = None) -> nn.Sequential:
    """The net that ``spec`` describes, initialised for certified training.

    Raises:
        SpecError: an unknown name; the message lists the known ones.
    """
    check_shape("input_shape", spec.input_shape)
    if not isinstance(spec.name, str) or spec.name not in NETS:
        raise SpecError(f"unknown net {spec.name!r}; known: {', '.join(NETS)}")
    layers = NETS[spec.name](spec)
    if spec.mean:
        layers.insert(0, Normalize(spec.mean, spec.std))
    net = nn.Sequential(*layers)
    ibp_init(net, generator)
    return net


def ibp_init(net: nn.Module, generator: torch.Generator | None = None) -> None:
    """Weights N(0, sqrt(2 pi) / fan_in), biases 0: interval widths neither grow nor vanish (Shi et al. 2021)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=math.sqrt(2 * math.pi) / fan_in, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _conv_net(spec: NetSpec, convolutions: Sequence[tuple[int, int, int]], hidden: int) -> list[nn.Module]:
    """Convolutions (width, kernel, stride) with padding 1, a hidden linear layer, the logits."""
    channels, height, width = spec.input_shape
    layers: list[nn.Module] = []
    for out_channels, kernel, stride in convolutions:
        layers.append(nn.Conv2d(channels, out_channels, kernel, stride, padding=1))
        if spec.batch_norm:
            layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU())
        channels = out_channels
        height, width = ((size + 2 - kernel) // stride + 1 for size in (height, width))
    if min(height, width) < 1:
        raise SpecError(f"net {spec.name} needs larger images than {spec.input_shape}")
    layers += [nn.Flatten(), nn.Linear(channels * height * width, hidden)]
    if spec.batch_norm:
        layers.append(nn.BatchNorm1d(hidden))
    layers += [nn.ReLU(), nn.Linear(hidden, spec.classes)]
    return layers
