"""Certify a data set for a list of sets, one JSON line per image, resumable after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import auto_LiRPA
import torch
from torch import nn

from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.record import Record, append_results
from cure_plugin.certification.related import decide_sets
from cure_plugin.certification.shards import Parts, Ranks, Shard
from cure_plugin.certification.verdict import Status
from cure_plugin.datasets import ImageData
from cure_plugin.errors import SpecError
from cure_plugin.inputs import like
from cure_plugin.progress import Watch, progress_bar, shown_on
from cure_plugin.sets import SetSpec, set_spec
from cure_plugin.sets.names import told_apart


def certify_dataset(
    certifier: Certifier,
    data: ImageData,
    sets: Sequence[SetSpec | str],
    path: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    label: str = "certify",
) -> list[Record]:
    """Decide every image of ``data`` for every set.

    Images are worked on in fixed batches, each with random starts of its own, so a resumed run gives
    the verdicts of an undisturbed one.

    Args:
        sets: specs, or their text.
        path: JSON-lines file to append to; images already in it are not redone, nor those in parts of it that
            :func:`certify_shard` left, and a resumed run leaves the file that an undisturbed one does. Beside it,
            ``<path>.settings.json`` guards against mixing runs, and ``<path>.seconds.jsonl`` holds the times.
        seed: of the attacks.
        progress: show a bar on standard error, or lines where that is no terminal.

    Returns:
        One record per image, in order.

    Raises:
        SpecError: no set, or the same one twice, or images or labels that are none of the net's.
        DataError: ``path`` holds results of another net, data or list of sets, or lines that are none.
        OutputError: ``path`` cannot be written.
    """
    run = _Run(certifier, data, sets, seed, label if progress else None)
    if path is None:
        return run.over(run.batches, {}, lambda batch: None)
    parts = run.parts(Path(path))
    known = parts.known()
    written = parts.begin(known)
    added = len(written)

    def write(batch: list[Record]) -> None:
        nonlocal added
        if batch[0].index >= added:
            append_results(parts.path, batch)

    records = run.over(run.batches, known, write)
    parts.clear()
    return records


def certify_shard(
    certifier: Certifier,
    data: ImageData,
    sets: Sequence[SetSpec | str],
    path: str | Path,
    shard: Shard | Ranks,
    seed: int = 0,
    progress: bool = False,
) -> list[Record] | None:
    """What one of several processes does of :func:`certify_dataset`; the records are those of one process.

    It goes on from whatever the parts of ``path`` hold, of however many processes.

    Args:
        shard: a fixed part, or the processes of ``torchrun``, which take the next batch each.

    Returns:
        All records, in order, in the one of torchrun's processes that put the parts together; None in others.

    Raises:
        SpecError, DataError, OutputError: as there.
    """
    run = _Run(certifier, data, sets, seed, "certify" if progress else None)
    parts = run.parts(Path(path))
    file = parts.begin_part(shard.name)
    known = parts.known()
    run.over((start for start in shard.take(run.batches) if start not in known), {}, partial(append_results, file))
    return parts.merged() if shard.finish() else None


class _Run:
    """What is certified, and how; ``label``: of a bar, None for none."""

    def __init__(
        self, certifier: Certifier, data: ImageData, sets: Sequence[SetSpec | str], seed: int, label: str | None
    ) -> None:
        specs = read_specs(sets)
        check_data(data, certifier)
        self.certifier, self.data, self.seed, self.label = certifier, data, seed, label
        self.sets = dict(zip(set_names(specs), specs, strict=True))
        self.batches = range(0, len(data), certifier.batch_size)

    def parts(self, path: Path) -> Parts:
        """The results file, and what guards it."""
        settings = {
            "net": fingerprint(self.certifier.net),
            "images": self.data.digest(),
            "sets": [repr(spec) for spec in self.sets.values()],
            "auto_LiRPA": auto_LiRPA.__version__,
            "methods": [repr(method) for method in self.certifier.methods],
            "batch_size": self.certifier.batch_size,
            "memory": self.certifier.memory,
            "seed": self.seed,
        }
        return Parts(path, settings, self.certifier.batch_size, len(self.data))

    def over(
        self, batches: Iterable[int], known: Mapping[int, Record], write: Callable[[list[Record]], object]
    ) -> list[Record]:
        """The records of batches, which go to ``write``; what is ``known`` is not decided again."""
        size, records = self.certifier.batch_size, list[Record]()
        with progress_bar(len(self.data), "image", self.label or "", self.label is not None, len(known)) as bar:
            for start in batches:
                batch = [known[index] for index in range(start, start + size) if index in known]
                if not batch:
                    batch = _certify_batch(self.certifier, self.data, self.sets, start, self.seed, shown_on(bar))
                    bar.set_postfix_str("", refresh=False)
                    bar.update(len(batch))
                write(batch)
                records += batch
        return records


def read_specs(sets: Sequence[SetSpec | str]) -> list[SetSpec]:
    """The specs, those given as text read.

    Raises:
        SpecError: no list, or one that is no spec.
    """
    if isinstance(sets, str) or not isinstance(sets, Sequence):
        raise SpecError(f"sets must be a list as ['linf=0.1', 'R(10)'], got {sets!r}")
    return [set_spec(one) for one in sets]


def check_data(data: ImageData, certifier: Certifier) -> None:
    """Refuse data before any of it is worked on.

    Raises:
        SpecError: no :class:`ImageData` or no certifier, or images of another shape than the certifier's.
    """
    if not isinstance(data, ImageData) or not isinstance(certifier, Certifier):
        found = f"{type(certifier).__name__} and {type(data).__name__}"
        raise SpecError(f"a Certifier and ImageData(images, labels, classes) are needed, got {found}")
    if data.shape != certifier.input_shape:
        raise SpecError(f"the images are {data.shape}, the net takes {certifier.input_shape}; certify other images")


def set_names(sets: Sequence[SetSpec]) -> list[str]:
    """A name for each set: the short one, or the set as written where several share the short one.

    Raises:
        SpecError: no set, or the same one twice.
    """
    return told_apart(sets, str)


def union_status(statuses: Sequence[Status]) -> Status:
    """Falsified if any set is, proved if all are, else undecided."""
    if "falsified" in statuses:
        return "falsified"
    return "proved" if all(status == "proved" for status in statuses) else "undecided"


def _certify_batch(
    certifier: Certifier, data: ImageData, sets: dict[str, SetSpec], start: int, seed: int, watch: Watch
) -> list[Record]:
    stop = min(start + certifier.batch_size, len(data))
    parameter = like(certifier.net)
    x, y = data.batch(slice(start, stop), parameter.device)
    x = x.to(parameter.dtype)
    with torch.no_grad():
        predictions = certifier.net(x).argmax(1).tolist()

    def generator(name: str) -> torch.Generator:
        return torch.Generator(parameter.device).manual_seed((seed * 1_000_003 + start) * 101 + list(sets).index(name))

    by_set = decide_sets(certifier, x, y, {name: spec.build() for name, spec in sets.items()}, generator, watch)
    return [
        Record(
            start + i,
            int(y[i]),
            predictions[i],
            {name: verdicts[i] for name, verdicts in by_set.items()},
            *_combined({name: verdicts[i].status for name, verdicts in by_set.items()}, sets),
        )
        for i in range(stop - start)
    ]


def _combined(statuses: dict[str, Status], sets: dict[str, SetSpec]) -> tuple[Status, dict[str, Status]]:
    """The statuses of unions of sets: a record's ``union`` and ``groups``."""
    groups = {
        group: union_status([statuses[name] for name, spec in sets.items() if spec.group == group])
        for group in dict.fromkeys(spec.group for spec in sets.values())
    }
    universal = union_status(list(statuses.values()))
    if len(groups) == 1:
        return universal, {}
    union = groups.pop("lp", universal)
    return union, {**groups, "universal": universal}


def fingerprint(net: nn.Module) -> str:
    """A hash of a net's layers and weights."""
    digest = hashlib.sha256(repr(net).encode())
    for name, value in net.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()
