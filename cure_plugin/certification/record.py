"""What certification found out about an image: one line of a results file, for one image and all sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from cure_plugin.certification.verdict import Status, Verdict
from cure_plugin.errors import DataError
from cure_plugin.json_files import (
    CONVERTER,
    append_lines,
    read_lines,
    read_record,
    resumable,
    start_lines,
    write_lines,
)


@dataclass(frozen=True)
class Record:
    """One image's verdicts.

    Attributes:
        index: of the image. label: its class. prediction: the net's.
        sets: set name -> verdict. A set goes by its short name (``l2``), or as written (``l2=0.5``) where several
            share that.
        union: the status over the lp balls, over everything where there are none.
        groups: where the sets are of several kinds: kind -> status, and ``universal`` over all.
    """

    index: int
    label: int
    prediction: int
    sets: dict[str, Verdict]
    union: Status
    groups: dict[str, Status]

    def timed(self, times: Times) -> Record:
        """The same verdicts with their times."""
        return replace(self, sets={name: replace(one, seconds=times.seconds[name]) for name, one in self.sets.items()})

    def untimed(self) -> Record:
        """The same verdicts without times: what runs of the same settings agree on."""
        return self.timed(Times(self.index, dict.fromkeys(self.sets, 0.0)))

    def times(self) -> Times:
        """The times alone."""
        return Times(self.index, {name: verdict.seconds for name, verdict in self.sets.items()})


@dataclass(frozen=True)
class Times:
    """Seconds spent on an image, per set."""

    index: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Origin:
    """What results are of, as hashes of net and images and the specs of the sets."""

    net: str
    images: str
    sets: list[str]


def _margin(value: Any, _: Any) -> float:
    return -math.inf if value is None else CONVERTER.structure(value, float)


# JSON knows no infinity: no margin was found. Times are kept beside, so a line without them has none.
CONVERTER.register_structure_hook(
    Verdict,
    make_dict_structure_fn(Verdict, CONVERTER, _cattrs_forbid_extra_keys=True, margin=override(struct_hook=_margin)),
)
CONVERTER.register_unstructure_hook(
    Verdict,
    make_dict_unstructure_fn(
        Verdict,
        CONVERTER,
        margin=override(unstruct_hook=lambda margin: margin if math.isfinite(margin) else None),
        seconds=override(omit_if_default=True),
        depth=override(omit_if_default=True),
    ),
)
CONVERTER.register_structure_hook(
    Origin, make_dict_structure_fn(Origin, CONVERTER, _cattrs_forbid_extra_keys=False)
)  # beside them a settings file holds what else decides the results


_AGAIN = "run cure certify again"


def beside(path: Path, suffix: str) -> Path:
    """A file of a results file."""
    return path.with_name(f"{path.name}.{suffix}")


def read_results(path: str | Path) -> list[Record]:
    """The records in a results file of ``cure certify``, without the times, which are kept beside it.

    Raises:
        DataError: unreadable, empty, or a line that is no record or has other sets than the first.
    """
    records = read_lines(Path(path), Record, _AGAIN, _follows)
    if not records:
        raise DataError(f"{path} holds no results; {_AGAIN}")
    return records


def whole_results(path: Path, settings: Mapping[str, Any], part: bool = False) -> list[Record]:
    """The records, with their times, that a run of these settings may go on from; none where there is no file.

    Args:
        part: of some images only, in any order.

    Raises:
        DataError: results of other settings, or files that are damaged by more than a kill.
    """
    if not resumable(path, beside(path, "settings.json"), settings, "other settings, net or data"):
        return []
    anew = f"delete {path} and run again"
    results = read_lines(path, Record, anew, _alike if part else _follows, torn=True)
    times = read_lines(beside(path, "seconds.jsonl"), Times, anew, partial(_times_of, results), torn=True)
    return [record.timed(entry) for record, entry in zip(results, times, strict=False)]


def start_results(path: Path, records: Sequence[Record], settings: Mapping[str, Any]) -> None:
    """Write the results file anew, and what lies beside it: what repeats from run to run is apart from what does not.

    Raises:
        OutputError: they cannot be written.
    """
    write_lines(beside(path, "seconds.jsonl"), [record.times() for record in records])
    start_lines(path, [record.untimed() for record in records], beside(path, "settings.json"), settings)


def append_results(path: Path, records: Sequence[Record]) -> None:
    """More records for a results file.

    Raises:
        OutputError: they cannot be written.
    """
    append_lines(beside(path, "seconds.jsonl"), [record.times() for record in records])
    append_lines(path, [record.untimed() for record in records])


def read_origin(path: Path) -> Origin | None:
    """What the results in ``path`` are of; None where no settings are kept beside them.

    Raises:
        DataError: the settings cannot be read.
    """
    settings = beside(path, "settings.json")
    if not settings.exists():
        return None
    try:
        return read_record(settings.read_text(encoding="utf-8"), Origin)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {settings}: {error}; delete it to compare without it") from error


def _follows(record: Record, before: Sequence[Record]) -> None:
    """Images come in order, all with the same sets."""
    if record.index != len(before):
        raise ValueError(f"image {record.index} where image {len(before)} belongs")
    _alike(record, before)


def _alike(record: Record, before: Sequence[Record]) -> None:
    """All have the same sets."""
    if before and (set(record.sets), set(record.groups)) != (set(before[0].sets), set(before[0].groups)):
        raise ValueError("other sets than on line 1")


def _times_of(results: Sequence[Record], times: Times, before: Sequence[Times]) -> None:
    """They come in the order of the results and are of the same sets; the last may be of a result that a kill took."""
    wanted = results[len(before)].index if len(before) < len(results) else times.index
    if times.index != wanted or (results and set(times.seconds) != set(results[0].sets)):
        raise ValueError(f"not the times of image {wanted}")
