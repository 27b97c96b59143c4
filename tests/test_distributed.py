"""Training on several processes: the same weights as on one, whatever the objective; one writes, all resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import all_trained

from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import load_data
from cure_plugin.errors import SpecError
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.training import Trainer, World, joined_processes, load_recipe

PROGRAM = Path(__file__).parent / "distributed_steps.py"

slow = pytest.mark.slow

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")


def run(*arguments: str, processes: int) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "names", [pytest.param(["random", "joint, both ways", "mixed"], marks=slow), ["cure", "union"]]
)
def test_two_processes_train_as_one(names: list[str], tmp_path: Path) -> None:
    run(str(PROGRAM), str(tmp_path / "two"), *names, processes=2)
    first, second = (torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in range(2))
    alone = all_trained(names)
    assert len(alone) == 4 * len(names)
    for name, weights in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - weights).abs().max()) < 1e-10, name


SHORT = {
    "net": "cnn_tiny",
    "epochs": 2,
    "natural_epochs": 0,
    "ramp_epochs": 1,
    "milestones": [],
    "batch_size": 500,
    "attack_steps": 1,
}


@slow
def test_the_command_goes_on_with_a_run_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, data = load_recipe("demo_cure", SHORT), load_data("mnist-slice", True)
    whole = Trainer(recipe, data, tmp_path / "whole")
    whole.run()
    begun = Trainer(recipe, data, tmp_path / "part")
    save = begun._save

    def save_and_stop() -> None:
        save()
        raise KeyboardInterrupt

    monkeypatch.setattr(begun, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        begun.run()
    keys = [f"{key}={value}" for key, value in SHORT.items()]
    done = run("-m", "cure_plugin", "train", "demo_cure", *keys, "--out", str(tmp_path / "part"), processes=2)
    assert done.count("found 1 of 2 epochs") == 1 and done.count("trained: ") == 1
    _, net = load_net(tmp_path / "part" / "checkpoint.pt")
    pairs = list(zip(whole.net.parameters(), net.parameters(), strict=True))
    assert max(float((one - other).detach().abs().max()) for one, other in pairs) < 1e-4
    assert len((tmp_path / "part" / "training.jsonl").read_text().splitlines()) == 2


def test_batch_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_net(NetSpec("cnn_tiny", (1, 28, 28), batch_norm=True))
    World(0, 1).check(net)
    with pytest.raises(SpecError, match=r"BatchNorm would normalise by each of 2 processes' part.*batch_norm: false"):
        World(0, 2).check(net)


def test_processes_that_cannot_talk_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SpecError, match="cannot talk to each other"), joined_processes("cpu"):
        pass


@slow
def test_the_example_prints_the_same_on_one_process_and_on_two() -> None:
    example = str(Path(__file__).parent.parent / "examples" / "distributed_training.py")
    assert run(example, processes=2) == run(example, processes=1) != ""
