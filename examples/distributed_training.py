"""A training loop of your own on several processes: torchrun --nproc-per-node 2 examples/distributed_training.py

Each process is given the whole batch and draws the same random numbers; the steps are those of a single process.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from cure_plugin import (
    CureObjective,
    Max,
    NetSpec,
    PerturbationLpBall,
    TrainingSet,
    bounded_module,
    build_net,
    load_data,
)
from cure_plugin.training import ObjectiveModule, World, joined_processes


def main(steps: int = 20, batch_size: int = 64) -> list[float]:
    """Train for a few steps and return the losses."""
    with joined_processes("cpu"):  # torchrun's; alone without it
        data = load_data("mnist-slice", train=True)
        net = build_net(NetSpec("cnn_tiny", data.shape), torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        objective = CureObjective(
            [TrainingSet(PerturbationLpBall(float("inf"), 0.1)), TrainingSet(PerturbationLpBall(2, 0.5))],
            strategy=Max(),
        )
        module: torch.nn.Module = ObjectiveModule(objective, bounded_module(net, data.shape), net)
        if World.joined().size > 1:
            module = DistributedDataParallel(module)
        generator = torch.Generator().manual_seed(0)  # the same in every process
        losses = []
        for _ in range(steps):
            x, y = data.batch(torch.randint(len(data), (batch_size,), generator=generator))
            outcome = module(x, y, scale=0.1, generator=generator)
            optimizer.zero_grad()
            outcome.loss.backward()
            optimizer.step()
            losses.append(float(outcome.loss.detach()))
        if World.joined().first:
            print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
