"""Train and certify the methods of a setting at equal radii; every run becomes a file of the ledger.

python benchmarks/reproduce.py small_mnist_small --data FOLDER               # all methods, seeds 0 and 1
python benchmarks/reproduce.py small_mnist_small --methods scratch --seeds 2 --data FOLDER
python benchmarks/reproduce.py mnist_small --methods scratch --device cuda --data FOLDER

A run that stopped goes on where it was; one that is done is not repeated. With overrides or --images a run is a try:
the last 5,000 training images are left out of training, and certified are the first of those, so that nothing is chosen
by test images; its figures go to its folder below --out (give each try one of its own).
`python benchmarks/ledger.py render` makes the tables and plots.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from entries import Entry, read_entry, write_entry
from ledger import COMMIT, RESULTS, hardware, record
from runs import certified, test_split, trained, validation_split

from cure_plugin.cli.options import read_overrides
from cure_plugin.errors import SpecError
from cure_plugin.training import load_recipe

SETTINGS = {
    "small_mnist_small": ("linf=0.1", "l2=0.5", "l1=1.0"),
    "small_mnist_large": ("linf=0.3", "l2=1.0", "l1=2.0"),
    "small_cifar_small": ("linf=2/255", "l2=0.25", "l1=0.5"),
    "small_cifar_large": ("linf=8/255", "l2=0.5", "l1=1.0"),
    "small_tinyimagenet": ("linf=1/255", "l2=36/255", "l1=72/255"),
    "mnist_small": ("linf=0.1", "l2=0.5", "l1=1.0"),
    "mnist_large": ("linf=0.3", "l2=1.0", "l1=2.0"),
    "cifar_small": ("linf=2/255", "l2=0.25", "l1=0.5"),
    "cifar_large": ("linf=8/255", "l2=0.5", "l1=1.0"),
    "tinyimagenet": ("linf=1/255", "l2=36/255", "l1=72/255"),
}
"""Setting -> sets certified after training, the paper's radii."""

METHODS = ("linf", "l2", "joint", "max", "random", "scratch", "finetune", "union")
"""Of the table; a setting's recipe file may hold more, as ablations."""

OPERATING_POINTS = ("scratch_clean", "union_clean", "union_whole", "union_robust", "union_finetune")
"""Other recipes of the best methods, which are reported on as many images."""

IMAGES = 1000
"""First test images that the ledger's runs are certified on."""

ABLATION_IMAGES = 500
"""The same of ablations and of other data: half of all images may be left to the certifier's slowest stages."""


def images_of(setting: str, method: str) -> int:
    """How many images a method is reported on: those of MNIST's tables on all."""
    whole = "mnist" in setting and method in (*METHODS, *OPERATING_POINTS)
    return IMAGES if whole else ABLATION_IMAGES


def run(setting: str, method: str, seed: int, options: argparse.Namespace) -> Path:
    """Train and certify one net; returns the ledger's file."""
    name = f"reproduce/{setting}-{method}-{seed}"
    folder = options.out / setting / f"{method}-{seed}"
    overrides = {"seed": seed, **read_overrides(options.overrides)}
    recipe = load_recipe(f"{setting}/{method}", overrides).to_mapping()
    attempt = bool(options.overrides) or options.images is not None
    images = options.images or images_of(setting, method)
    path = folder / "figures.json" if attempt else RESULTS / f"{name}.json"
    if path.exists() and not attempt:
        if read_entry(path).figures.get("recipe", recipe) != recipe:
            raise SpecError(f"{path} is of another recipe; delete it, and {folder}, to run the present one")
        return path
    splits = (validation_split if attempt else test_split)(options.data)
    trainer = trained(
        f"{setting}/{method}",
        overrides,
        lambda name: options.out / f"{name}-{seed}",
        splits,
        device=options.device,
        test_images=min(500, images),
        progress=options.progress,
    )
    test = splits(trainer.recipe.data)[1].first(images).centre_crop(*trainer.spec.input_shape[1:])
    texts = SETTINGS[setting]
    net, label = trainer.net.cpu(), f"{method}-{seed}"
    summary = asdict(certified(net, trainer.spec, test, texts, folder / "results.jsonl", label, options.progress))
    figures = {
        "setting": setting,
        "method": method,
        "radii": list(texts),
        "images": len(test),
        "epochs": trainer.recipe.epochs,
        "recipe": recipe,
        "overrides": options.overrides,
        "threads": torch.get_num_threads(),
        "device": options.device,
        "train_seconds": round(sum(entry["seconds"] for entry in trainer.history), 1),
        "certify_seconds": round(sum(summary["seconds"].values()), 1),
        **summary,
    }
    command = f"python benchmarks/reproduce.py {setting} --methods {method} --seeds {seed}"
    if options.device != "cpu":
        command += f" --device {options.device}"
    if attempt:
        return write_entry(path, Entry(COMMIT, seed, hardware(), command, figures))
    return record(name, command, seed, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and certify the methods of a setting.")
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change, for tries")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--images", type=int, help="held out images to certify, for tries")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"), help="nets and verdicts")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_intermixed_args()
    for seed in options.seeds:
        for method in options.methods:
            path = run(options.setting, method, seed, options)
            figures = read_entry(path).figures
            certified = ", ".join(f"{name} {share:.3f}" for name, share in figures["certified"].items())
            print(f"{path.stem}: clean {figures['clean']:.3f}, {certified}, union {figures['union']:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
