"""The nets that ship: files as their index says, names wherever paths are taken, and what is wrong said by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cure_plugin import zoo
from cure_plugin.checkpoint import load_checkpoint, load_net, save_checkpoint
from cure_plugin.cli import main
from cure_plugin.datasets import load_data
from cure_plugin.errors import CheckpointError
from cure_plugin.json_files import plain
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.training import load_recipe
from cure_plugin.training.trainer import Trainer

SPEC = NetSpec("cnn_tiny", (1, 28, 28))
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def described(path: Path, **changed: str) -> zoo.ZooNet:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    figures = 10, 0.9, {"linf=0.1": 0.5}, 0.5
    return zoo.ZooNet(path.name, changed.get("sha256", digest), SPEC.name, "mnist-slice", "a/b", 0, *figures, "a.json")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A zoo of one net, and one whose file is another's."""
    folder = tmp_path / "zoo"
    save_checkpoint(folder / "net.pt", SPEC, build_net(SPEC, torch.Generator().manual_seed(0)))
    shutil.copy(folder / "net.pt", folder / "other.pt")
    nets = {"a/b": described(folder / "net.pt"), "a/other": described(folder / "other.pt", sha256="0" * 64)}
    (folder / "index.json").write_text(json.dumps(plain(zoo.Index(nets))))
    monkeypatch.setattr(zoo, "FOLDER", folder)
    zoo.zoo_nets.cache_clear()
    yield folder
    zoo.zoo_nets.cache_clear()


def test_a_name_stands_for_a_file(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = load_net(shipped / "net.pt")
    x = torch.rand(2, 1, 28, 28)
    for name in ("zoo:a/b", "a/b", Path("zoo:a/b")):
        assert torch.equal(load_net(name)[1](x), net(x))
    monkeypatch.chdir(tmp_path)
    other = build_net(SPEC, torch.Generator().manual_seed(1)).eval()
    save_checkpoint("a/b", SPEC, other)  # a file of one's own comes first
    assert torch.equal(load_net("a/b")[1](x), other(x)) and torch.equal(load_net("zoo:a/b")[1](x), net(x))


def test_what_is_wrong_is_said(shipped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no net 'a/c'; known: a/b, a/other"):
        load_net("zoo:a/c")
    with pytest.raises(CheckpointError, match=r"zoo:a/other is damaged.*install cure_plugin anew"):
        load_net("a/other")
    (shipped / "net.pt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read zoo:a/b.*install cure_plugin anew"):
        load_checkpoint("zoo:a/b")
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint nowhere\.pt"):
        load_net("nowhere.pt")


def test_commands_take_names(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["certify", "zoo:a/b", "linf=0.001", "--images", "2", "--methods", "IBP", "--out", str(tmp_path / "c")]
    assert main(arguments) == 0
    assert main(["export", "zoo:a/b", "--images", "1", "--out", str(tmp_path / "e")]) == 0
    assert main(["certify", "zoo:a/c", "linf=0.1", "--out", str(tmp_path / "d")]) == 2
    capsys.readouterr()
    assert main(["zoo"]) == 0
    assert "zoo:a/b" in capsys.readouterr().out


def test_training_starts_from_a_name(shipped: Path, tmp_path: Path) -> None:
    changes = {"net": SPEC.name, "start": "zoo:a/b", "epochs": "1", "natural_epochs": "0", "ramp_epochs": "0"}
    trainer = Trainer(load_recipe("demo_linf", changes), load_data("mnist-slice", True).first(8), tmp_path)
    assert torch.equal(next(trainer.net.parameters()), next(load_net("a/b")[1].parameters()))


@pytest.mark.parametrize("name", zoo.zoo_nets())
def test_shipped_nets(name: str) -> None:
    one = zoo.zoo_nets()[name]
    spec, net = load_net(name)
    assert (zoo.FOLDER / one.file).stat().st_size <= 700_000 and spec.name == one.net
    assert net(torch.rand(2, *spec.input_shape)).shape == (2, spec.classes)
    figures = json.loads((RESULTS / one.ledger).read_text())["figures"]
    assert (one.clean, one.union, one.images) == tuple(figures[key] for key in ("clean", "union", "images"))
    assert list(one.certified.values()) == list(figures["certified"].values())
    assert set(one.certified) == set(figures["radii"])
