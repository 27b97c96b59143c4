"""What a Python must do at least: import, one certificate, the list of sets, training in two steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cure_plugin import PerturbationLpBall
from cure_plugin.bounds.module import bounded_module
from cure_plugin.certification import Certifier
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import load_data

# isort: split
from auto_LiRPA import BoundedTensor

TWO_STEPS = (
    "net=cnn_tiny",
    "batch_size=5000",
    "natural_epochs=0",
    "epochs=1",
    "ramp_epochs=0",
    "milestones=[]",
    "gradient_projection=0",
)
FIXTURE = Path(__file__).parents[1] / "benchmarks" / "fixtures" / "ball.pt"


def main() -> int:
    _, net = load_net(FIXTURE)
    x, y = load_data("mnist-slice", False).first(1).batch(slice(0, 1))
    ball = PerturbationLpBall(2, 0.1)
    lower, upper = bounded_module(net, (1, 28, 28)).compute_bounds(x=(BoundedTensor(x, ball),), method="CROWN")
    assert bool((lower <= net(x)).all() and (net(x) <= upper).all())
    verdicts, _ = Certifier(net, (1, 28, 28)).decide(x, y, ball)
    assert [verdict.status for verdict in verdicts] == ["proved"]
    cure = [sys.executable, "-m", "cure_plugin"]
    subprocess.run([*cure, "sets"], check=True, stdout=subprocess.DEVNULL)
    with TemporaryDirectory() as folder:
        subprocess.run([*cure, "train", "demo_cure", "--out", folder, *TWO_STEPS], check=True)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: import, certificate, sets, training")
    return 0


if __name__ == "__main__":
    sys.exit(main())
