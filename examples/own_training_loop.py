"""CURE's loss in a training loop of your own: two hooks, everything else stays yours."""

from __future__ import annotations

import torch

from cure_plugin import (
    CureObjective,
    Max,
    NetSpec,
    PerturbationLpBall,
    Sabr,
    TrainingSet,
    bounded_module,
    build_net,
    load_data,
    smooth_ramp,
)


def main(steps: int = 60, batch_size: int = 64) -> list[float]:
    """Train for a few steps and return the losses."""
    data = load_data("mnist-slice", train=True)
    net = build_net(NetSpec("cnn_small", data.shape), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

    bounded = bounded_module(net, data.shape)  # hook 1: auto_LiRPA's wrapper, sharing the net's parameters
    objective = CureObjective(  # hook 2: the multi-norm loss
        [TrainingSet(PerturbationLpBall(float("inf"), 0.1), Sabr(0.4)), TrainingSet(PerturbationLpBall(2, 0.5))],
        strategy=Max(),
        alignment=0.5,
        align_from="l2",
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        x, y = data.batch(torch.randint(len(data), (batch_size,), generator=generator))
        outcome = objective(bounded, net, x, y, scale=0.2 * smooth_ramp(step / steps), generator=generator)
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        losses.append(float(outcome.loss.detach()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
