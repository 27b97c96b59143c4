"""Random nets for attacks on bounds: every operator and attribute that nets for images use, drawn by a seed.

A net is drawn as the text of an expression (:class:`Drawn`), so that a failing one can be printed as a script.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """``x + body(x)``, or ``shortcut(x) + body(x)``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


class Difference(Residual):
    """``shortcut(x) - body(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) - self.body(x)


class Concatenated(nn.Module):
    """Outputs of two branches joined along ``dim``."""

    def __init__(self, one: nn.Module, other: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.one, self.other, self.dim = one, other, dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.other(x)], self.dim)


class View(nn.Module):
    """Each sample in another shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], *self.shape)


class Permuted(nn.Module):
    """Axes in another order, the batch's first."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *self.axes)


class Affine(nn.Module):
    """``(x - shift) / scale`` or ``x * scale + shift`` with buffers, one entry or one per channel."""

    def __init__(self, shift: list[float], scale: list[float], divides: bool, axes: int) -> None:
        super().__init__()
        shape = (-1, *[1] * (axes - 1))
        self.register_buffer("shift", torch.tensor(shift).view(shape))
        self.register_buffer("scale", torch.tensor(scale).view(shape))
        self.divides = divides

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale if self.divides else x * self.scale + self.shift


class Picked(nn.Module):
    """Entries ``index`` along ``dim``, repeats allowed."""

    def __init__(self, dim: int, index: list[int]) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, self.dim, self.index)


class Sliced(nn.Module):
    """``x[:, start:stop]`` along ``dim``."""

    def __init__(self, dim: int, start: int, stop: int) -> None:
        super().__init__()
        self.dim, self.start, self.stop = dim, start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.dim, self.start, self.stop - self.start)


class Quotient(nn.Module):
    """``(x - shift) / (offset + |x|)``: a numerator that changes sign."""

    def __init__(self, shift: float, offset: float) -> None:
        super().__init__()
        self.shift, self.offset = shift, offset

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / (self.offset + x.abs())


class Product(nn.Module):
    """``x * sigmoid(body(x))``, a gate."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.body(x))


class Averaged(nn.Module):
    """Mean over axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


class Branching(nn.Module):
    """``body(x)`` or its negative, as values say that Python reads."""

    def __init__(self, body: nn.Module, read: str) -> None:
        super().__init__()
        self.body, self.read = body, read

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return z if _READS[self.read](x if len(self.read) % 2 else z) else -z


_READS: dict[str, Callable[[Tensor], object]] = {
    "bool": lambda x: bool(x.mean() > 0.5),
    "item": lambda x: x.amax().item() > 0.8,
    "number": lambda x: int(10 * x.detach().sum()) % 2,
    "list": lambda x: x.flatten().tolist()[0] > 0.5,
    "array": lambda x: np.asarray(x.detach()).mean() > 0.5,
    "count": lambda x: len(x[x > 0.5]) % 2,
    "order": lambda x: x.flatten().argmax() % 2,
    "sameness": lambda x: torch.equal(x.round(), x.clamp(0, 1).round()),
}


class Function(nn.Module):
    """A function of torch by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return _FUNCTIONS[self.name](x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "square": lambda x: x * x,
    "power": lambda x: x**3,
    "exp": lambda x: torch.exp(x.clamp(max=2)),
    "sin": torch.sin,
    "cos": torch.cos,
    "minimum": lambda x: torch.minimum(x, torch.full_like(x, 0.1)),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "negated": lambda x: -x,
    "root": lambda x: torch.sqrt(x.abs() + 0.1),
    "reciprocal": lambda x: 1 / (x.abs() + 0.5),
    "softmax": lambda x: F.softmax(x, dim=1),
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """A net as text: ``build()`` makes it."""

    seed: int
    text: str
    shape: Shape
    classes: int
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """The net in eval mode, its weights drawn by the seed."""
        return build(self.text, self.seed).to(self.dtype)

    def script(self) -> str:
        """Python lines that make the net and an input, run in the folder of the tests."""
        return "\n".join(
            [
                "import torch",
                "from random_nets import build",
                f"net = build({self.text!r}, {self.seed}).to({self.dtype})",
                f"start = torch.Generator().manual_seed({self.seed})",
                f"x = torch.rand(1, *{self.shape}, generator=start).to({self.dtype})",
            ]
        )


def build(text: str, seed: int) -> nn.Module:
    """The net of an expression in eval mode, weights and statistics drawn by ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net: nn.Module = eval(text)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    assert module.running_mean is not None and module.running_var is not None
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.1, 0.5)
                    if module.affine:
                        module.weight.normal_(0, 1.0)
                        module.bias.normal_(0, 0.2)
    return net.eval()


def branching(drawn: Drawn) -> Drawn:
    """``drawn`` with a branch around it that the seed picks."""
    read = random.Random(drawn.seed).choice(list(_READS))
    return replace(drawn, text=f"Branching({drawn.text}, {read!r})")


class _Draw:
    """One net on its way: text of layers so far, shape of what they put out."""

    def __init__(self, seed: int, exotic: bool) -> None:
        self.random = random.Random(seed)
        self.seed, self.exotic = seed, exotic

    def pick(self, *choices: object) -> object:
        return self.random.choice(choices)

    def net(self) -> Drawn:
        """Convolutions or linear layers, 1 to 5 of them, over an input of 1 or 2 spatial axes or none."""
        axes = self.random.choice((0, 1, 2, 2, 2, 2))
        if axes == 0:
            shape: Shape = (self.random.randint(3, 9),)
        elif axes == 1:
            shape = (self.random.randint(1, 3), self.random.randint(6, 12))
        else:
            side = self.random.randint(5, 8)
            other = side if self.random.random() < 0.5 else self.random.randint(4, 10)
            shape = (self.random.randint(1, 3), side, other)
        at, layers = shape, []
        if self.random.random() < 0.3:
            layers.append(self.front(at))
        for _ in range(self.random.randint(0 if axes == 0 else 1, 3)):
            for layer in (self.layer(at), self.activation()):
                layers.append(layer)
                at = _shape_after(layers, shape)
        if len(at) > 1:
            layers += self.flattened(at)
            at = _shape_after(layers, shape)
        if self.random.random() < 0.5:
            layers += [f"nn.Linear({at[0]}, {self.random.randint(4, 8)})", self.activation()]
            at = _shape_after(layers, shape)
        classes = self.random.randint(2, 4)
        layers.append(f"nn.Linear({at[0]}, {classes})")
        return Drawn(self.seed, f"nn.Sequential({', '.join(layers)})", shape, classes)

    def front(self, shape: Shape) -> str:
        """What users put in front of the first layer."""
        count = self.random.choice((1, shape[0]))
        shift = [round(self.random.uniform(-0.5, 0.5), 2) for _ in range(count)]
        scale = [round(self.random.uniform(0.2, 0.6), 2) for _ in range(count)]
        return self.random.choice(
            (f"Affine({shift}, {scale}, {self.pick(True, False)}, {len(shape)})", self.norm(shape))
        )

    def norm(self, shape: Shape) -> str:
        """Normalisation of what has that shape."""
        kind = {1: "1d", 2: "1d", 3: "2d"}[len(shape)]
        return f"nn.BatchNorm{kind}({shape[0]}{self.random.choice(('', '', ', affine=False'))})"

    def activation(self) -> str:
        common = ("nn.ReLU()",) * 6 + ("nn.LeakyReLU(0.1)", "nn.Sigmoid()", "nn.Tanh()")
        layers = ("nn.ReLU6()", "nn.Hardtanh()", "nn.Softplus()", "nn.ELU()", "nn.GELU()", "nn.SiLU()")
        rare = (*layers, *(f"Function({name!r})" for name in _FUNCTIONS))
        return self.random.choice(rare if self.exotic and self.random.random() < 0.4 else common)

    def layer(self, shape: Shape) -> str:
        """A layer or block over what has that shape."""
        if len(shape) == 1:
            return self.block_of_features(shape)
        choices = [self.convolution] * 6 + [self.residual, self.concatenation, self.pool, self.transposed, self.padded]
        choices += [self.normalised, self.view] + ([self.odd] * 3 if self.exotic else [])
        return self.random.choice(choices)(shape)

    def block_of_features(self, shape: Shape) -> str:
        width = self.random.randint(3, 8)
        linear = f"nn.Linear({shape[0]}, {width})"
        kinds = [linear] * 4
        kinds.append(f"Residual(nn.Sequential({linear}, nn.ReLU(), nn.Linear({width}, {shape[0]})))")
        kinds.append(f"Concatenated({linear}, nn.Linear({shape[0]}, 3))")
        kinds.append(f"nn.Sequential({linear}, {self.norm((width,))})")
        if self.exotic:
            index = [self.random.randrange(shape[0]) for _ in range(shape[0] + 1)]
            kinds += [f"nn.Sequential(Picked(1, {index}), nn.Linear({len(index)}, {width}))"]
            kinds += [f"nn.Sequential(Quotient({self.random.uniform(-0.2, 0.7):.2f}, 0.5), {linear})"]
            kinds += [f"nn.Sequential({linear}, nn.LayerNorm({width}))", f"Product(nn.Linear({shape[0]}, {shape[0]}))"]
            kinds += [f"Difference({linear}, {linear})"]
        return self.random.choice(kinds)

    def convolution(self, shape: Shape, channels: int | None = None, same: bool = False) -> str:
        """A convolution of any geometry; ``same``: one that keeps the spatial sizes."""
        spatial = shape[1:]
        out = channels or self.random.choice((2, 4))
        groups = self.random.choice((1, 1, 1, 1, 2)) if shape[0] % 2 == 0 and out % 2 == 0 else 1
        square = self.random.random() < 0.6
        kernel, stride, padding, dilation = [], [], [], []
        for size in spatial:
            k = self.random.choice((1, 2, 3, 3, 4))
            d = self.random.choice((1, 1, 1, 2))
            p = self.random.choice((0, 1, 1, 2))
            s = self.random.choice((1, 1, 2, 3))
            if same:
                k, d, p, s = 3, 1, 1, 1
            if d * (k - 1) + 1 > size + 2 * p:
                k, d, p = 1, 1, 0
            kernel.append(k), stride.append(s), padding.append(p), dilation.append(d)
        if square and not same:
            small = min(spatial)
            kernel, stride, padding, dilation = (
                [part[0]] * len(spatial) for part in (kernel, stride, padding, dilation)
            )
            if dilation[0] * (kernel[0] - 1) + 1 > small + 2 * padding[0]:
                kernel, dilation = [1] * len(spatial), [1] * len(spatial)
        bias = self.random.random() < 0.8
        extra = ", padding_mode='circular'" if self.exotic and not same and self.random.random() < 0.08 else ""
        if self.exotic and not same and self.random.random() < 0.1:
            pad: object = "same"
            stride = [1] * len(spatial)
        else:
            pad = tuple(padding)
            if extra and any(p > size for p, size in zip(padding, spatial, strict=True)):
                extra = ""
        return (
            f"nn.Conv{len(spatial)}d({shape[0]}, {out}, {tuple(kernel)}, {tuple(stride)}, {pad!r}, {tuple(dilation)}, "
            f"groups={groups}, bias={bias}{extra})"
        )

    def residual(self, shape: Shape) -> str:
        inner = self.random.choice((2, 4))
        first, second = self.convolution(shape, inner, True), self.convolution((inner, *shape[1:]), shape[0], True)
        body = f"{first}, nn.ReLU(), {second}"
        kind = "Difference" if self.random.random() < 0.2 else "Residual"
        if self.random.random() < 0.4:
            one = f"nn.Conv{len(shape) - 1}d({shape[0]}, 2, 1, 2)"
            same = f"nn.Conv{len(shape) - 1}d({shape[0]}, 2, 3, 2, 1)"
            return f"{kind}({same}, {one})"
        return f"{kind}(nn.Sequential({body}))"

    def concatenation(self, shape: Shape) -> str:
        one, other = self.convolution(shape, 2, True), self.convolution(shape, 2, True)
        return f"Concatenated({one}, nn.Sequential({other}, nn.ReLU()))"

    def pool(self, shape: Shape) -> str:
        axes = len(shape) - 1
        kernel = min(self.random.choice((2, 2, 3)), *shape[1:])
        stride = self.random.choice((1, 2, kernel))
        padding = self.random.choice((0, 0, kernel // 2))
        kind = self.random.choice(("Avg", "Avg", "Max"))
        extra = ""
        if kind == "Avg" and self.random.random() < 0.3:
            extra = ", count_include_pad=False"
        elif self.random.random() < 0.2:
            extra = ", ceil_mode=True"
        sizes: object = kernel
        if axes == 2 and self.random.random() < 0.3 and padding == 0:
            sizes = (kernel, 1)
        return f"nn.{kind}Pool{axes}d({sizes}, {stride}, {padding}{extra})"

    def transposed(self, shape: Shape) -> str:
        axes = len(shape) - 1
        stride = self.random.choice((1, 2))
        output = self.random.choice((0, 1)) if stride == 2 else 0
        groups = 2 if shape[0] % 2 == 0 and self.random.random() < 0.2 else 1
        kernel, padding = self.random.choice(((3, 1), (2, 0), (3, 0)))
        return f"nn.ConvTranspose{axes}d({shape[0]}, 2, {kernel}, {stride}, {padding}, {output}, {groups})"

    def padded(self, shape: Shape) -> str:
        axes = len(shape) - 1
        pads = tuple(self.random.randint(0, 2) for _ in range(2 * axes))
        value = self.random.choice((0.0, 0.0, 0.5))
        after = self.convolution(
            (shape[0], *(size + pads[2 * i] + pads[2 * i + 1] for i, size in enumerate(shape[:0:-1])))
        )
        return f"nn.Sequential(nn.ConstantPad{axes}d({pads}, {value}), {after})"

    def normalised(self, shape: Shape) -> str:
        return f"nn.Sequential({self.convolution(shape, 4, True)}, {self.norm((4, *shape[1:]))})"

    def view(self, shape: Shape) -> str:
        """Another shape for the same entries, and a convolution or linear layer on it."""
        entries = math.prod(shape)
        kind = self.random.randrange(3 if self.exotic else 2)
        if kind == 0 and entries % 2 == 0:
            return (
                f"nn.Sequential(View(2, {entries // 2}, 1), nn.Conv2d(2, 2, (3, 1)))"
                if entries >= 6
                else self.pool(shape)
            )
        if kind == 1:
            return (
                f"nn.Sequential(nn.Flatten(), nn.Linear({entries}, 12), nn.ReLU(), View(1, 3, 4), nn.Conv2d(1, 2, 2))"
            )
        axes = list(range(1, len(shape) + 1))
        self.random.shuffle(axes)
        after = tuple(shape[axis - 1] for axis in axes)
        return f"nn.Sequential(Permuted({', '.join(map(str, axes))}), {self.convolution(after)})"

    def odd(self, shape: Shape) -> str:
        kinds = [f"Product(nn.Conv{len(shape) - 1}d({shape[0]}, {shape[0]}, 1))"]
        index = [self.random.randrange(shape[0]) for _ in range(shape[0] + 1)]
        kinds.append(f"nn.Sequential(Picked(1, {index}), {self.convolution((len(index), *shape[1:]))})")
        after = self.convolution((shape[0], shape[1] - 1, *shape[2:]), same=True)
        kinds.append(f"nn.Sequential(Sliced(2, 1, {shape[1]}), {after})")
        kinds.append(f"nn.Sequential(Quotient({self.random.uniform(-0.2, 0.7):.2f}, 0.5), {self.convolution(shape)})")
        kinds.append(f"nn.Sequential({self.convolution(shape, 4, True)}, nn.GroupNorm(2, 4))")
        if len(shape) == 3:
            kinds.append("nn.Upsample(scale_factor=2)")
            kinds.append(
                "nn.Sequential(nn.ReflectionPad2d(1), " + self.convolution((shape[0], shape[1] + 2, shape[2] + 2)) + ")"
            )
        return self.random.choice(kinds)

    def flattened(self, shape: Shape) -> list[str]:
        """From maps to features."""
        spatial = len(shape) - 1
        choices = [["nn.Flatten()"]] * 5 + [[f"nn.AdaptiveAvgPool{spatial}d(1)", "nn.Flatten()"]]
        if self.exotic:
            choices += [
                [f"Averaged({', '.join(str(2 + i) for i in range(spatial))})"],
                ["nn.Flatten(1, 2)", "nn.Flatten()"],
            ]
        return self.random.choice(choices)


def _shape_after(layers: list[str], shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(build(f"nn.Sequential({', '.join(layers)})", 0)(torch.zeros(1, *shape)).shape[1:])


def draw(seed: int, exotic: bool = False) -> Drawn:
    """The net of that seed; ``exotic``: with operators that few nets for images use."""
    for attempt in range(100):
        try:
            drawn = _Draw(seed + 1_000_003 * attempt, exotic).net()
        except RuntimeError:  # a window larger than what is left of the maps
            continue
        return Drawn(seed, drawn.text, drawn.shape, drawn.classes)
    raise AssertionError(f"no net for seed {seed}")
