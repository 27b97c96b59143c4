"""A few steps and an epoch, in this process or on as many as torchrun starts: their weights go to a file each.

Run by its test with the files' name and the names of objectives.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cure_plugin.bounds.module import bounded_module
from cure_plugin.datasets import load_data
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.sets import set_spec
from cure_plugin.training import (
    CureObjective,
    Joint,
    LipschitzMargin,
    Max,
    MtlIbp,
    ObjectiveModule,
    RandomPartition,
    Sabr,
    Single,
    TrainingSet,
    joined_processes,
    projected_epoch,
    run_epoch,
)

LINF = TrainingSet(set_spec("linf=0.1").build(), Sabr(0.4))
L2 = TrainingSet(set_spec("l2=0.5").build(), Sabr(0.5))

OBJECTIVES: dict[str, dict[str, Any]] = {
    "cure": {"sets": [LINF, L2], "strategy": Max(), "alignment": 0.5, "regularizer": 0.5},
    "random": {"sets": [LINF, L2], "strategy": RandomPartition()},
    "joint, both ways": {"sets": [LINF, L2], "strategy": Joint(), "alignment": 0.5, "align_from": "both"},
    "union": {"sets": [LINF, TrainingSet(L2.perturbation, LipschitzMargin())], "natural": 0.2},
    "mixed": {"sets": [TrainingSet(LINF.perturbation, MtlIbp(0.5))], "strategy": Single(), "regularizer": 1.0},
}


def weights(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def trained(objective: CureObjective, sizes: list[int], epoch: bool) -> Tensor:
    """The weights after batches of these sizes; an epoch is projected on a natural one."""
    torch.manual_seed(0)
    data = load_data("mnist-slice", True).first(sum(sizes))
    net = build_net(NetSpec("cnn_tiny", data.shape), torch.Generator().manual_seed(0)).double()
    module = ObjectiveModule(objective, bounded_module(net, data.shape), net)
    losses: nn.Module = module
    if torch.distributed.is_initialized():
        losses = nn.parallel.DistributedDataParallel(module)
    generator = torch.Generator().manual_seed(1)
    cut = torch.arange(len(data)).split(sizes)

    def batches() -> Any:
        for chosen in cut:
            x, y = data.batch(chosen)
            yield x.double(), y

    def run(scale: float | None) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        run_epoch(net, batches(), lambda x, y: losses(x, y, scale, generator), optimizer, 1e-5, 10.0)

    if epoch:
        projected_epoch(net, lambda: run(0.7), lambda: run(None), 0.3)
    else:
        run(0.7)
    return weights(net)


def all_trained(names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of each of the objectives after each kind of batches."""
    return {
        f"{name}/{kind}": trained(replace(CureObjective(**OBJECTIVES[name]), attack_steps=2), sizes, kind == "epoch")
        for name in names
        for kind, sizes in (("step", [8]), ("uneven", [7]), ("fewer", [2]), ("epoch", [8, 8, 5]))
    }


def main() -> None:
    torch.set_num_threads(1)
    with joined_processes("cpu"):
        torch.save(all_trained(sys.argv[2:]), f"{sys.argv[1]}.{torch.distributed.get_rank()}")


if __name__ == "__main__":
    main()
