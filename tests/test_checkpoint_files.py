"""Checkpoints of other hands: wrapped names, nests, half and double weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cure_plugin.certification import Certifier
from cure_plugin.checkpoint import load_start, load_state_dict, save_checkpoint
from cure_plugin.cli.options import load_model
from cure_plugin.errors import CheckpointError
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec

SPEC = NetSpec("cnn_tiny", (1, 16, 16), 3, True)


@pytest.fixture
def net() -> nn.Sequential:
    return build_net(SPEC, torch.Generator().manual_seed(0)).eval()


def renamed(net: nn.Module, front: str) -> dict[str, Tensor]:
    return {f"{front}{name}": value for name, value in net.state_dict().items()}


@pytest.mark.parametrize(
    "front", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net."]
)
@pytest.mark.parametrize("nest", ["", "state_dict", "model", "net", "model_state_dict", "state_dict/model"])
def test_names_and_nests(net: nn.Sequential, front: str, nest: str, tmp_path: Path) -> None:
    payload: Any = renamed(net, front)
    for name in filter(None, reversed(nest.split("/"))):
        payload = {
            "epoch": 3,
            "acc": 91.5,
            "loss": torch.ones(()),
            "optimizer": {"state": {0: {"step": torch.ones(1)}}},
            name: payload,
        }
    torch.save(payload, tmp_path / "w.pt")
    x = torch.rand(2, 1, 16, 16)
    again = load_state_dict(tmp_path / "w.pt", SPEC)
    assert torch.equal(again(x), net(x)) and not again.training
    assert torch.equal(next(iter(load_start(tmp_path / "w.pt", SPEC).values())), next(net.parameters()))


def test_real_wrappers(net: nn.Sequential, tmp_path: Path) -> None:
    x = torch.rand(2, 1, 16, 16)
    inner = nn.Sequential(*[torch.compile(layer) if isinstance(layer, nn.Conv2d) else layer for layer in net])
    for number, wrapped in enumerate((nn.DataParallel(net), torch.compile(net), inner)):
        torch.save({"net": wrapped.state_dict(), "acc": 0.9}, tmp_path / f"{number}.pt")
        assert torch.equal(load_state_dict(tmp_path / f"{number}.pt", SPEC)(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_weights(net: nn.Sequential, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {n: v.to(dtype) if v.is_floating_point() else v for n, v in net.state_dict().items()}
    torch.save(stored, tmp_path / "w.pt")
    again = load_state_dict(tmp_path / "w.pt", SPEC)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in again.parameters()} == {wanted}
    assert all(torch.equal(v.to(again.state_dict()[n]), again.state_dict()[n]) for n, v in stored.items())
    assert {v.dtype for v in load_start(tmp_path / "w.pt", SPEC).values()} == {torch.float32, torch.int64}
    x = torch.rand(2, 1, 16, 16)
    loaded, shape = load_model(tmp_path / "w.pt", SPEC)
    verdicts, _ = Certifier(loaded, shape, ("IBP",)).decide(
        x, loaded(x.to(wanted)).argmax(1), set_spec("linf=0").build()
    )
    assert {verdict.status for verdict in verdicts} == {"proved"}


def test_our_own_checkpoints_start_a_training(net: nn.Sequential, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours.pt", SPEC, net, {"epoch": 1})
    assert torch.equal(next(iter(load_start(tmp_path / "ours.pt", SPEC).values())), next(net.parameters()))


@pytest.mark.parametrize(
    "payload",
    [
        {"epoch": 1},
        {"state_dict": {"epoch": 1}},
        {"state_dict": {}},
        [1, 2],
        torch.ones(3),
        {1: torch.ones(1)},
        {"module.": torch.ones(1)},
        {"model": {"0.weight": torch.ones(3)}},
    ],
)
def test_what_is_no_state_dict_is_one_line(payload: Any, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt") as refusal:
        load_state_dict(tmp_path / "w.pt", SPEC)
    assert "\n" not in str(refusal.value)
