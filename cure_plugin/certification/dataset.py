"""Certify a data set for a list of sets, one JSON line per image, resumable after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import auto_LiRPA
import torch
from torch import nn

from cure_plugin.certification.certifier import Certifier
from cure_plugin.certification.record import Record, append_results, start_results, whole_results
from cure_plugin.certification.related import decide_sets
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
        path: JSON-lines file to append to; images already in it are not redone, and a resumed run leaves the
            file that an undisturbed one does. Beside it, ``<path>.settings.json`` guards against mixing runs,
            and ``<path>.seconds.jsonl`` holds the times.
        seed: of the attacks.
        progress: show a bar on standard error, or lines where that is no terminal.

    Returns:
        One record per image, in order.

    Raises:
        SpecError: no set, or the same one twice, or images or labels that are none of the net's.
        DataError: ``path`` holds results of another net, data or list of sets, or lines that are none.
        OutputError: ``path`` cannot be written.
    """
    sets = read_specs(sets)
    check_data(data, certifier)
    path = None if path is None else Path(path)
    names = set_names(sets)
    settings = {
        "net": fingerprint(certifier.net),
        "images": data.digest(),
        "sets": [repr(spec) for spec in sets],
        "auto_LiRPA": auto_LiRPA.__version__,
        "methods": [repr(method) for method in certifier.methods],
        "batch_size": certifier.batch_size,
        "memory": certifier.memory,
        "seed": seed,
    }
    records = whole_results(path, settings) if path is not None else []
    if len(records) < len(data):  # images are decided batch by batch
        records = records[: len(records) // certifier.batch_size * certifier.batch_size]
    if path is not None:
        start_results(path, records, settings)
    with progress_bar(len(data), "image", label, progress, len(records)) as bar:
        for start in range(len(records), len(data), certifier.batch_size):
            batch = _certify_batch(certifier, data, dict(zip(names, sets, strict=True)), start, seed, shown_on(bar))
            records += batch
            if path is not None:
                append_results(path, batch)
            bar.set_postfix_str("", refresh=False)
            bar.update(len(batch))
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
