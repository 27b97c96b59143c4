"""l1 and l2 balls as alpha-beta-CROWN takes them: YAML and a data loader, as its VNNLIB reader knows boxes only."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import yaml

from cure_plugin.datasets import ImageData
from cure_plugin.errors import SpecError
from cure_plugin.files import write_atomically, write_text
from cure_plugin.sets import PerturbationLpBall, PerturbationSet

_LOADER = '''\
"""Images and labels for alpha-beta-CROWN: named by the YAML files beside this one."""

from pathlib import Path

import numpy as np
import torch


def data(spec):
    stored = np.load(Path(__file__).resolve().parent / "images.npz")
    return {
        "X": torch.from_numpy(stored["images"]),
        "labels": torch.from_numpy(stored["labels"]),
        "eps": spec["epsilon"],
        "norm": spec["norm"],
    }
'''


def write_abcrown(path: Path, model: Path, data: ImageData, own: PerturbationSet, timeout: float) -> None:
    """Write the YAML file ``path``, and ``data.py`` and ``images.npz`` beside it: every image of ``data``.

    The ball is not cut with the pixel domain there, so that it holds more: a proof carries over to ours.

    Args:
        model: the ONNX file.

    Raises:
        SpecError: ``own`` is no l1 or l2 ball. OutputError: a file cannot be written.
    """
    if type(own) is not PerturbationLpBall or not own.shared_budget:
        raise SpecError(f"alpha-beta-CROWN's lp form is for l1 and l2 balls, got {own}; export a box instead")
    images, labels = data.batch(slice(0, len(data)))
    folder, buffer = path.parent, io.BytesIO()
    np.savez_compressed(buffer, images=images.numpy(), labels=labels.numpy())
    write_atomically(folder / "images.npz", lambda file: file.write(buffer.getvalue()))
    write_text(folder / "data.py", _LOADER)
    config = {
        "general": {"device": "cpu"},
        "model": {"onnx_path": str(model.resolve())},
        "data": {
            "dataset": f'Customized("{(folder / "data.py").resolve()}", "data")',
            "num_outputs": data.classes,
            "start": 0,
            "end": len(data),
        },
        "specification": {"type": "lp", "norm": int(own.p), "epsilon": float(own.eps)},
        "attack": {"pgd_order": "skip"},
        "bab": {"timeout": timeout},
    }
    write_text(path, yaml.safe_dump(config, sort_keys=False))
