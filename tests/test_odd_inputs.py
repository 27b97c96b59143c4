"""What people hand in that is unusual, ambiguous or wrong works as the usual spelling does, or one line says why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_net
from torch import Tensor, nn

from cure_plugin import PerturbationGeometric, PerturbationLpBall, PerturbationPatch, PerturbationUnion
from cure_plugin.attacks import Pgd, find_counterexample, pgd, worst_margin_loss
from cure_plugin.bounds.margins import margin_matrix
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import Certifier, certify_dataset
from cure_plugin.certification.compare import compare_files
from cure_plugin.certification.curves import certified_curves
from cure_plugin.certification.related import decide_sets
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import CureError
from cure_plugin.inputs import plain_net
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec
from cure_plugin.training import CureObjective, Sabr, Trainer, TrainingSet, ibp_loss, load_recipe, natural_loss

SHAPE = (1, 8, 8)
BALL = PerturbationLpBall(math.inf, 0.02)
NET = small_net("plain")
X = (torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
with torch.no_grad():
    Y = NET(X).argmax(1)
OPTIONS: dict[str, Any] = {"attack_steps": 2, "restarts": 1, "alpha_iterations": 2}
CERTIFIER = Certifier(NET, SHAPE, **OPTIONS)
DATA = load_data("mnist-slice", False).first(2)
USUAL = CERTIFIER.lower_bound(X, Y, BALL, "CROWN")

IMAGES: dict[str, tuple[Any, str]] = {
    "array": (X.numpy(), ""),
    "lists": (X.tolist(), ""),
    "float64 of float32's values": (X.double(), ""),
    "float64 array": (X.double().numpy(), ""),
    "with gradients": (X.clone().requires_grad_(), ""),
    "strided": (X.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), ""),
    "a float32 array's copy in Fortran order": (X.numpy().copy(order="F"), ""),
    "float64 of other values": (X.double() + 1e-12, "float64, which the net's float32 cannot hold"),
    "bytes": ((X * 255).byte(), "x is uint8"),
    "a byte array": ((X * 255).byte().numpy(), "x is uint8"),
    "whole numbers": ((X * 255).long(), "x is int64"),
    "booleans": (X > 0.5, "x is bool"),
    "complex": (X + 0j, "x is complex64"),
    "0 to 255": (X * 255, "outside domain"),
    "normalised": ((X - 0.5) / 0.25, "outside domain"),
    "just outside": (X - 0.01, "outside domain"),
    "no batch axis": (X[0], r"add a batch axis, x\[None\]"),
    "no channel": (X[:, 0], r"x must be \(B, 1, 8, 8\)"),
    "channels last": (X.permute(0, 2, 3, 1), "channels come first"),
    "flattened": (X.flatten(1), r"x must be \(B, 1, 8, 8\), got \(2, 64\)"),
    "another size": (torch.rand(2, 1, 9, 8), r"got \(2, 1, 9, 8\)"),
    "too many axes": (X[None], "x must be"),
    "NaN": (X * math.nan, "NaN or infinite"),
    "infinite": (X / 0, "outside domain|NaN or infinite"),
    "text": ("x.png", "got str 'x.png'"),
    "nothing": (None, "got NoneType"),
    "ragged lists": ([[1.0, 2.0], [3.0]], "x must be a tensor"),
    "one number": (0.5, "x must be"),
    "sparse": (X.to_sparse(), "plain tensor"),
    "no values": (X.to("meta"), "plain tensor"),
    "no images": (X[:0], "x is empty"),
}

LABELS: dict[str, tuple[Any, str]] = {
    "list": (Y.tolist(), ""),
    "array": (Y.numpy(), ""),
    "tuple": (tuple(Y.tolist()), ""),
    "column": (Y[:, None], ""),
    "column array": (Y[:, None].numpy(), ""),
    "int32": (Y.int(), ""),
    "bytes": (Y.byte(), ""),
    "whole floats": (Y.float(), ""),
    "broken floats": (Y + 0.5, "whole numbers"),
    "one-hot": (torch.eye(3)[Y], r"y.argmax\(1\)"),
    "one-hot whole numbers": (torch.eye(3)[Y].long(), r"y.argmax\(1\)"),
    "scores": (NET(X).detach(), r"y.argmax\(1\)"),
    "too few": (Y[:1], r"y must be \(2,\)"),
    "too many": (Y.repeat(2), r"y must be \(2,\)"),
    "one number": (int(Y[0]), r"y must be \(2,\)"),
    "a row": (Y[None], r"y must be \(2,\)"),
    "the number of classes": (torch.tensor([0, 3]), "labels lie in 0 .. 3, but the net has 3 classes"),
    "negative": (torch.tensor([-1, 0]), "labels lie in -1 .. 0"),
    "booleans": (Y > 0, "y is bool"),
    "NaN": (Y * math.nan, "whole numbers"),
    "infinite": (Y / 0.0, "whole numbers"),
    "unsigned": (Y.numpy().astype("uint64"), ""),
    "sparse": (Y.to_sparse(), "plain tensor"),
    "names": (["cat", "dog"], "y must be a tensor"),
    "nothing": (None, "got NoneType"),
}


class Permuted(nn.Module):
    """Takes channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net("plain")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2))


class ResidualFeatures(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.flatten(1)))
        return self.last(torch.relu(hidden + self.inner(hidden)))


def head(*layers: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    with torch.no_grad():
        net(torch.rand(2, *shape))
    return net.eval()


def norm(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), layer, nn.ReLU(), nn.Linear(8, 3)).eval()


def compiled_in_place() -> nn.Module:
    net = norm(nn.BatchNorm1d(8))
    net.compile()
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "channels last": (Permuted, (8, 8, 1), ""),
    "residual features": (ResidualFeatures, SHAPE, ""),
    "max pooling": (lambda: head(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)), SHAPE, ""),
    "sequence": (lambda: head(nn.Conv1d(1, 2, 3), shape=(1, 9)), (1, 9), "Conv1d: take auto_LiRPA 0.7.1|^$"),
    "volume": (lambda: head(nn.Conv3d(1, 2, 3), shape=(1, 4, 4, 4)), (1, 4, 4, 4), "Conv3d: no version"),
    "padding same": (lambda: head(nn.Conv2d(1, 2, 3, padding="same")), SHAPE, ""),
    "padding same, dilated": (lambda: head(nn.Conv2d(1, 2, 3, padding="same", dilation=2)), SHAPE, ""),
    "padding same, even": (lambda: head(nn.Conv2d(1, 2, 4, padding="same")), SHAPE, ""),
    "padding same, oblong": (lambda: head(nn.Conv2d(1, 2, (2, 3), padding="same", bias=False)), SHAPE, ""),
    "padding valid": (lambda: head(nn.Conv2d(1, 2, 3, padding="valid")), SHAPE, ""),
    "circular": (lambda: head(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), SHAPE, ""),
    "reflect": (lambda: head(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), SHAPE, "padding of a mode"),
    "layer norm": (lambda: norm(nn.LayerNorm(8)), SHAPE, "quotient by a root|^$"),
    "batch norm without affine": (lambda: norm(nn.BatchNorm1d(8, affine=False)), SHAPE, ""),
    "group norm": (lambda: head(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), SHAPE, "GroupNorm: take BatchNorm2d"),
    "instance norm": (lambda: head(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4)), SHAPE, "take BatchNorm2d"),
    "dropout": (lambda: norm(nn.Dropout()), SHAPE, "nn.Identity in its place"),
    "gelu": (lambda: norm(nn.GELU()), SHAPE, "GELU: take ReLU"),
    "data parallel": (lambda: nn.DataParallel(small_net("plain")), SHAPE, ""),
    "data parallel twice": (lambda: nn.DataParallel(nn.DataParallel(small_net("plain"))), SHAPE, ""),
    "compiled": (lambda: torch.compile(small_net("plain")), SHAPE, ""),  # type: ignore[return-value]
    "compiled inside": (
        lambda: nn.Sequential(torch.compile(nn.Flatten()), nn.Linear(64, 3)),  # type: ignore[list-item]
        SHAPE,
        "",
    ),
    "compiled in place": (compiled_in_place, SHAPE, ""),
    "compiled, parallel": (lambda: torch.compile(nn.DataParallel(small_net("plain"))), SHAPE, ""),  # type: ignore
    "training mode": (lambda: small_net("batch-norm").train(), SHAPE, ""),
    "one class": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), SHAPE, "has 1 classes"),
    "a function": (lambda: torch.relu, SHAPE, "net must be a torch.nn.Module"),  # type: ignore[return-value]
    "another shape": (lambda: small_net("linear"), (1, 9, 9), r"input_shape \(1, 9, 9\)"),
}

CE = natural_loss(NET)
OBJECTIVE = CureObjective([TrainingSet(BALL)], attack_steps=1)
BOUNDED = bounded_module(NET, SHAPE)
LOSSES: dict[str, Callable[[Any, Any], object]] = {
    "pgd": lambda x, y: pgd(NET, x, y, BALL, Pgd(1)),
    "search": lambda x, y: find_counterexample(NET, x, y, BALL, 2, 1),
    "natural": CE,
    "objective": lambda x, y: OBJECTIVE(BOUNDED, NET, x, y),
    "ibp": lambda x, y: ibp_loss(BOUNDED, x, y, BALL),
}
"""Training and attacks take tensors of the net's type as they are: what is not one is refused."""

PAIRS: dict[str, tuple[Any, Any, str]] = {
    "array": (X.numpy(), Y, "x must be a float batch"),
    "bytes": ((X * 255).byte(), Y, "x must be a float batch"),
    "no images": (None, Y, "x must be a float batch"),
    "float64": (X.double(), Y, "x is float64 on cpu, the net float32 on cpu"),
    "half": (X.half(), Y, "x is float16"),
    "sparse": (X.to_sparse(), Y, "x must be a float batch"),
    "list of labels": (X, Y.tolist(), "torch.long"),
    "too few labels": (X, Y[:1], r"y must be \(2,\)"),
    "a column": (X, Y[:, None], r"y must be \(2,\)"),
    "one-hot": (X, torch.eye(3)[Y], "torch.long"),
    "out of range": (X, Y + 3, "labels lie in"),
}

DATA = ImageData((X * 255).byte(), Y, 3)


class Odd(nn.Module):
    """What ``change`` makes of a net and its input."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = small_net("plain"), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net, x)


def failing(error: Exception) -> nn.Module:
    def fail(net: nn.Module, x: Tensor) -> Tensor:
        raise error

    return Odd(fail)


OTHERS: dict[str, tuple[Callable[[], object], str]] = {
    "labels that do not match logits": (lambda: worst_margin_loss(torch.rand(2, 3), Y[:1]), r"y must be \(2,\)"),
    "a tuple of logits": (lambda: Certifier(Odd(lambda net, x: (net(x), x)), SHAPE), "must give a tensor, got tuple"),
    "a net that asserts": (lambda: Certifier(failing(AssertionError()), SHAPE), "not fit the net: AssertionError"),
    "a net that says two lines": (lambda: Certifier(failing(ValueError("a\nb")), SHAPE), "does not fit the net: a"),
    "a lazy net": (lambda: Certifier(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), SHAPE), "holds no values yet"),
    "a net on meta": (lambda: Certifier(small_net("plain").to("meta"), SHAPE), "holds no values yet"),
    "one method": (lambda: Certifier(NET, SHAPE, methods="CROWN"), "methods must be a list"),
    "memory as text": (lambda: Certifier(NET, SHAPE, memory="2"), "memory"),  # type: ignore[arg-type]
    "unknown method": (lambda: CERTIFIER.lower_bound(X, Y, BALL, "CRWN"), "unknown method 'CRWN'"),
    "splitting is no bound": (
        lambda: CERTIFIER.proves(X, Y, BALL, "splitting"),
        "splitting bounds no whole set at once",
    ),
    "a seed": (lambda: CERTIFIER.decide(X, Y, BALL, 0), "must be a torch.Generator"),  # type: ignore[arg-type]
    "sets as one text": (lambda: certify_dataset(CERTIFIER, DATA, "linf=0.1"), "sets must be a list"),
    "no data": (lambda: certify_dataset(CERTIFIER, (X, Y), ["l2=0.1"]), "ImageData"),  # type: ignore[arg-type]
    "factors that fall": (lambda: certified_curves(CERTIFIER, DATA, ["l2=0.1"], [2.0, 1.0]), "factors must increase"),
    "no factors": (lambda: certified_curves(CERTIFIER, DATA, ["l2=0.1"], []), "factors must be a list"),
    "data of floats": (lambda: ImageData(X, Y, 3), r"images must be uint8 \(N, C, H, W\)"),
    "data's labels": (lambda: ImageData((X * 255).byte(), Y + 3, 3), "labels lie in"),
    "no set": (lambda: CERTIFIER.decide(X, Y, "linf=0.1"), "perturbation must be a cure_plugin set"),  # type: ignore
    "a set's spec": (lambda: CERTIFIER.proves(X, Y, set_spec("l2=1"), "CROWN"), "must be a cure_plugin set"),  # type: ignore
    "patch on features": (lambda: PerturbationPatch(2, 2).box(torch.rand(2, 9)), ""),
    "natural loss": (lambda: natural_loss(NET)(X, torch.tensor([0, 3])), "labels lie in 0 .. 3"),
    "natural loss, int32": (lambda: natural_loss(NET)(X, Y.int()), "torch.long"),
    "natural loss, a list": (lambda: natural_loss(NET)(X, Y.tolist()), "torch.long"),  # type: ignore[arg-type]
    "margins": (lambda: margin_matrix(torch.tensor([0, -1]), 3), "labels lie in -1 .. 0"),
    "pgd": (lambda: pgd(NET, X, torch.tensor([0, 7]), BALL), "labels lie in 0 .. 7"),
    "search": (lambda: find_counterexample(NET, X, torch.tensor([0, 7]), BALL, 2, 1), "labels lie in 0 .. 7"),
    "objective": (
        lambda: CureObjective([TrainingSet(BALL)])(bounded_module(NET, SHAPE), NET, X, torch.tensor([3, 0])),
        "labels lie in 0 .. 3",
    ),
}


def outcome(call: Callable[[], object], message: str) -> object:
    """What ``call`` gives, or None where it is refused in one line that says ``message`` (``^$``: or works)."""
    if not message:
        return call()
    try:
        result = call()
    except CureError as error:
        said = str(error)
    else:
        assert "^$" in message
        return result
    assert re.search(message, said) and "\n" not in said, said
    return None


ENTRIES: dict[str, Callable[[Any, Any], object]] = {
    "decide": lambda x, y: CERTIFIER.decide(x, y, BALL),
    "proved": lambda x, y: CERTIFIER.proved(x, y, BALL),
    "lower_bound": lambda x, y: CERTIFIER.lower_bound(x, y, BALL, "CROWN"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    x, message = IMAGES[name]
    for entry, call in ENTRIES.items():
        found = outcome(lambda call=call: call(x, Y), message)  # type: ignore[misc]
        if entry == "lower_bound" and found is not None:
            assert isinstance(found, Tensor) and torch.allclose(found, USUAL, atol=1e-6)


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    y, message = LABELS[name]
    for entry, call in ENTRIES.items():
        found = outcome(lambda call=call: call(X, y), message)  # type: ignore[misc]
        if entry == "lower_bound" and found is not None:
            assert isinstance(found, Tensor) and torch.allclose(found, USUAL, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_nets(name: str) -> None:
    """Accepted ones have bounds that sampled points keep to, by every method, and keep their parameters."""
    make, shape, message = NETS[name]
    net = make()
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    state = [*net.parameters()] if isinstance(net, nn.Module) else []

    def call() -> object:
        certifier = Certifier(net, shape, **OPTIONS)
        plain = plain_net(net)
        assert [*map(id, plain.parameters())] == [*map(id, state)] and "forward" not in vars(plain)
        with torch.no_grad():
            y = plain(x).argmax(1)
            points = torch.cat([BALL.sample(x, torch.Generator().manual_seed(seed)) for seed in range(30)])
            lowest = -_worst(plain(points), y.repeat(30)).view(30, 2).amax(0)
        for method in ("IBP", "CROWN", "alpha-CROWN"):
            assert bool((certifier.lower_bound(x, y, BALL, method) <= lowest + 1e-5).all())
        return certifier.decide(x, y, BALL)

    outcome(call, message)


def _worst(logits: Tensor, y: Tensor) -> Tensor:
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_attacks(name: str) -> None:
    x, y, message = PAIRS[name]
    for call in LOSSES.values():
        outcome(lambda call=call: call(x, y), message)  # type: ignore[misc]


def test_sets_as_text_and_a_path_as_text(tmp_path: Path) -> None:
    usual = certify_dataset(CERTIFIER, DATA, [set_spec("linf=0.02")])
    path = str(tmp_path / "results.jsonl")
    assert [one.union for one in certify_dataset(CERTIFIER, DATA, ["linf=0.02"], path)] == [one.union for one in usual]
    assert compare_files(path, path)[0].images == 2


def test_several_sets_take_what_one_takes() -> None:
    sets = {"linf": BALL, "l2": PerturbationLpBall(2, 0.05)}
    usual, odd = (
        decide_sets(CERTIFIER, x, y, sets, lambda _: torch.Generator().manual_seed(0))
        for x, y in ((X, Y), (X.tolist(), Y.tolist()))
    )
    assert [[v.status for v in usual[name]] for name in sets] == [[v.status for v in odd[name]] for name in sets]


def test_a_net_without_weights_is_bounded() -> None:
    bound = Certifier(nn.Flatten(), SHAPE, **OPTIONS).lower_bound(X, Y, BALL, "IBP")
    with torch.no_grad():
        for seed in range(20):
            point = BALL.sample(X, torch.Generator().manual_seed(seed)).flatten(1)
            assert bool((bound <= -_worst(point, Y) + 1e-6).all())


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    call, message = OTHERS[name]
    if message:
        outcome(call, message)
    else:
        with pytest.raises(CureError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "perturbation",
    [PerturbationPatch(2, 2), PerturbationGeometric.parse("R(5)"), PerturbationUnion([BALL, PerturbationPatch(1, 1)])],
)
def test_pixels_of_0_to_255_are_refused_by_every_set(perturbation: Any) -> None:
    """Also where the net errs on such an image, and nothing would have to be bounded."""
    for y in (Y, (Y + 1) % 3):
        with pytest.raises(CureError, match="outside domain"):
            CERTIFIER.decide(X * 255, y, perturbation)


WRONG: list[Any] = [None, "x", b"1", [], {}, object(), 1j, math.nan, torch.tensor([0.1, -0.2]), lambda x: x]

MADE_OF: dict[str, Callable[[Any], object]] = {
    "norm": lambda wrong: PerturbationLpBall(wrong, 0.1),
    "eps": lambda wrong: PerturbationLpBall(2, wrong),
    "domain": lambda wrong: PerturbationLpBall(2, 0.1, wrong if wrong is not None else ()),  # type: ignore[arg-type]
    "side": lambda wrong: PerturbationPatch(wrong, 2),
    "block": lambda wrong: PerturbationPatch(2, 2, wrong if wrong is not None else ()),  # type: ignore[arg-type]
    "patch domain": lambda wrong: PerturbationPatch(2, 2, None, wrong),
    "transformations": lambda wrong: PerturbationGeometric(wrong, [0], [1]),
    "lower": lambda wrong: PerturbationGeometric(["R"], wrong, [1]),
    "members": lambda wrong: PerturbationUnion(wrong),
    "spec": lambda wrong: set_spec(wrong),
    "net": lambda wrong: Certifier(wrong, SHAPE),
    "shape": lambda wrong: Certifier(NET, wrong),
    "methods": lambda wrong: Certifier(NET, SHAPE, wrong if wrong != [] else None),  # type: ignore[arg-type]
    "memory": lambda wrong: Certifier(NET, SHAPE, memory=wrong if wrong is not None else 0),
    "pieces": lambda wrong: Certifier(NET, SHAPE, pieces=wrong),
    "wrapped": lambda wrong: bounded_module(wrong, SHAPE),
    "wrapped shape": lambda wrong: bounded_module(NET, wrong),
    "training set": lambda wrong: TrainingSet(wrong),
    "loss": lambda wrong: TrainingSet(BALL, loss=wrong),
    "ratio": lambda wrong: TrainingSet(BALL, Sabr(wrong)),
    "mix": lambda wrong: TrainingSet(BALL, loss="cc-ibp", mix=wrong),
    "sets": lambda wrong: CureObjective(wrong if wrong != [] else [None]),
    "bounded": lambda wrong: CureObjective([TrainingSet(BALL)])(wrong, NET, X, Y),
    "model": lambda wrong: CureObjective([TrainingSet(BALL)])(bounded_module(NET, SHAPE), wrong, X, Y),
    "scale": lambda wrong: CureObjective([TrainingSet(BALL)])(bounded_module(NET, SHAPE), NET, X, Y, wrong),
    "recipe": lambda wrong: load_recipe(wrong),
    "overrides": lambda wrong: load_recipe("demo_cure", wrong if wrong not in (None, {}) else [1]),
    "recipe's data": lambda wrong: load_recipe("demo_cure", {"data": wrong}),
    "recipe's epochs": lambda wrong: load_recipe("demo_cure", {"epochs": wrong}),
    "data set": lambda wrong: load_data(wrong, True),
    "trainer's recipe": lambda wrong: Trainer(wrong, DATA),
    "trainer's data": lambda wrong: Trainer(load_recipe("demo_cure"), wrong),
    "kind of net": lambda wrong: build_net(NetSpec(wrong, (1, 28, 28))),
    "net's shape": lambda wrong: build_net(NetSpec("cnn_tiny", wrong)),
    "certified data": lambda wrong: certify_dataset(CERTIFIER, wrong, [set_spec("linf=0.1")]),
    "certified sets": lambda wrong: certify_dataset(CERTIFIER, DATA, wrong),
    "certifier": lambda wrong: certify_dataset(wrong, DATA, [set_spec("linf=0.1")]),
}


@pytest.mark.parametrize("name", MADE_OF)
def test_arguments_of_another_kind_are_refused_in_one_line(name: str) -> None:
    for wrong in WRONG:
        with pytest.raises(CureError) as caught:
            MADE_OF[name](wrong)
        assert "\n" not in str(caught.value), wrong


def test_there_are_many() -> None:
    assert len(IMAGES) + len(LABELS) + len(NETS) + len(PAIRS) + len(OTHERS) >= 120
