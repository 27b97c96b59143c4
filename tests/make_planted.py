"""Make the stored nets with planted counterexamples anew, or report what attacks find in them.

python tests/make_planted.py             # all of them, into tests/fixtures/planted.pt: about 5 minutes on one core
python tests/make_planted.py 3 17        # these seeds only, the others stay
python tests/make_planted.py --report    # makes nothing
"""

from __future__ import annotations

import argparse

import torch
from planted import COUNT, Planted, family, found_by_pgd, load_planted, make_planted, save_planted, stored_seeds

from cure_plugin.attacks import find_counterexample

SAMPLES = 100_000


def pgd_finds(planted: Planted, steps: int, restarts: int) -> bool:
    """Whether projected gradient ascent finds a counterexample."""
    return bool(found_by_pgd(planted, 1, steps, restarts, torch.Generator().manual_seed(0)))


def search_finds(planted: Planted, steps: int, restarts: int) -> bool:
    """Whether the library's search finds a counterexample."""
    generator = torch.Generator().manual_seed(0)
    found, _ = find_counterexample(planted.net, planted.x, planted.y, planted.perturbation, steps, restarts, generator)
    return bool(found)


def sampling_finds(planted: Planted) -> bool:
    """Whether random points of the set hold a counterexample."""
    generator = torch.Generator().manual_seed(0)
    x = planted.x.repeat(SAMPLES // 10, 1, 1, 1)
    with torch.no_grad():
        return any(
            bool((planted.margin(planted.perturbation.random_start(x, generator)) <= 0).any()) for _ in range(10)
        )


ATTACKS = {
    "PGD of 40 steps, 2 restarts": lambda planted: pgd_finds(planted, 40, 2),
    "PGD of 200 steps, 5 restarts": lambda planted: pgd_finds(planted, 200, 5),
    "the certifier's search (40 steps, 2 restarts)": lambda planted: search_finds(planted, 40, 2),
    f"{SAMPLES:,} random points": sampling_finds,
}


def report() -> None:
    """Print how many of the stored nets each attack breaks."""
    nets = {seed: load_planted(seed) for seed in range(COUNT)}
    for name, finds in ATTACKS.items():
        found = [seed for seed, planted in nets.items() if finds(planted)]
        which = ", ".join(f"{seed} ({family(seed)}, {nets[seed].perturbation.name})" for seed in found)
        print(f"{name}: {len(found)} of {COUNT}" + (f": {which}" if found else ""))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, help="default: all")
    parser.add_argument("--report", action="store_true", help="print what attacks find")
    options = parser.parse_args()
    if options.report:
        report()
        return
    seeds = options.seeds or range(COUNT)
    made = {seed: load_planted(seed) for seed in stored_seeds()}
    for seed in seeds:
        made[seed] = make_planted(seed)
        print(f"{seed}: {family(seed)}, {made[seed].perturbation}", flush=True)
    save_planted(dict(sorted(made.items())))


if __name__ == "__main__":
    main()
