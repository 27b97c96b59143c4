"""Decide several sets at once: what is known of one settles those that lie in it or around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.verdict import Status, Verdict
from cure_plugin.progress import Watch, unwatched
from cure_plugin.sets import PerturbationSet


def decide_sets(
    certifier: Certifier,
    x: Tensor,
    y: Tensor,
    sets: dict[str, PerturbationSet],
    generator: Callable[[str], torch.Generator],
    watch: Watch = unwatched,
) -> dict[str, list[Verdict]]:
    """Verdicts for a batch, by the sets' names.

    Larger sets come first: their proofs hold for the sets they cover, which are not looked at then. A
    counterexample in a set is one of every set that covers it.

    Args:
        x: (B, *input_shape); y: labels (B,).
        generator: of the attack's random starts on the set of that name. watch: of splits.

    Raises:
        SpecError: see :meth:`Certifier.decide`.
    """
    for perturbation in sets.values():
        x, y = certifier.checked(x, y, perturbation)
    covering = {name: [o for o in sets if o != name and sets[o].covers(sets[name])] for name in sets}
    decided: dict[str, list[Verdict]] = {}
    for name in sorted(sets, key=lambda name: len(covering[name])):
        verdicts = [_settled(decided, covering[name], index, "proved") for index in range(len(x))]
        left = torch.tensor([index for index, verdict in enumerate(verdicts) if verdict is None], dtype=torch.long)
        if left.numel():
            some = sets[name].select(x, left)
            found, _ = certifier.decide(x[left], y[left], some, generator(name), watch)
            for index, verdict in zip(left.tolist(), found, strict=True):
                verdicts[index] = verdict
        decided[name] = [verdict for verdict in verdicts if verdict is not None]
    for name, known in decided.items():
        inside = [other for other in sets if name in covering[other]]
        for index, verdict in enumerate(known):
            broken = _settled(decided, inside, index, "falsified")
            if verdict.status == "undecided" and broken is not None:
                known[index] = replace(broken, seconds=verdict.seconds, pieces=verdict.pieces, depth=verdict.depth)
    return {name: decided[name] for name in sets}


def _settled(decided: dict[str, list[Verdict]], names: list[str], index: int, status: Status) -> Verdict | None:
    """The verdict ``status`` on image ``index`` by the first of the sets ``names`` that has it."""
    for name in names:
        if name in decided and decided[name][index].status == status:
            return Verdict(status, decided[name][index].margin, f"by {name}")
    return None
