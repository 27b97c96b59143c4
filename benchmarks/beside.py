"""Another verifier on the questions of bench_third_party.py: the same images, seconds and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cure_plugin.errors import DataError
from cure_plugin.export import encode, onnx_model, write_vnnlib
from cure_plugin.sets import PerturbationLpBall, PerturbationSet
from cure_plugin.vnncomp.graphs import write_model
from cure_plugin.vnncomp.instances import Instance, write_instances
from cure_plugin.vnncomp.run import Run, verify
from cure_plugin.vnncomp.verifiers import Verifier

STATUS = {"unsat": "proved", "sat": "falsified"}
"""What a verifier's results are called here; all else, and a ``sat`` whose point does not hold, is undecided."""


@dataclass(frozen=True)
class Beside:
    """A verifier that is asked what we are asked, an image at a time.

    Attributes:
        seconds: its timeout.
        folder: of one net, whose name the verifier gets as ``{category}``; it keeps questions and answers, which are
            not asked again.
    """

    verifier: Verifier
    seconds: float
    folder: Path

    def decide(
        self, net: nn.Sequential, images: tuple[Tensor, Tensor], own: PerturbationSet, ours: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], float]:
        """(a row for each of ours, seconds that the verifier takes to start).

        Misclassified images are not asked: they are falsified, as ours are. Seconds of the others are those of the
        process without its start, which is what it takes for the first image alone, a box of radius 0.

        Raises:
            DataError: the verifier fails, or one of us proves what the other falsifies.
        """
        model = onnx_model(net, tuple(images[0].shape[1:]))
        write_model(model, self.folder / "model.onnx")
        asked = [index for index, one in enumerate(ours) if one["stage"] != "clean"]
        rows, start = [{**one, "seconds": 0.0} for one in ours], 0.0
        if asked:
            x, y = (part[asked[0]] for part in images)
            start = self._ask("start", model, x, int(y), PerturbationLpBall(float("inf"), 0.0)).seconds
        for index in tqdm(asked, desc=f"{self.folder.name}, {self.verifier.name}"):
            x, y = (part[index] for part in images)
            run = self._ask(str(index), model, x, int(y), own)
            status = "undecided" if run.fault else STATUS.get(run.result, "undecided")
            if {status, ours[index]["status"]} == {"proved", "falsified"}:
                raise DataError(
                    f"image {index}: {self.verifier.name} says {status}, we say {ours[index]['status']} "
                    f"({ours[index]['stage']}); both cannot be true: see {self.folder / str(index)}"
                )
            rows[index] = {"status": status, "stage": run.result, "seconds": max(0.0, round(run.seconds - start, 3))}
        return rows, start

    def _ask(self, name: str, model: onnx.ModelProto, x: Tensor, label: int, own: PerturbationSet) -> Run:
        """What the verifier answers for one image."""
        write_vnnlib(self.folder / f"{name}.vnnlib", encode(model, x, label, own, "box").wanted)
        instances = self.folder / f"{name}.csv"
        write_instances(instances, [Instance("model.onnx", f"{name}.vnnlib", self.seconds)])
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        verifier = replace(self.verifier, environment={**self.verifier.environment, **threads})
        (run,) = verify(instances, verifier, self.folder / name, category=self.folder.name)
        if run.result == "error":
            raise DataError(f"{verifier.name} fails on {instances}: {run.message}")
        return run
