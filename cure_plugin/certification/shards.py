"""Certification on several processes or machines: each writes a file of its own, and these are put together at the end.

Batches are handed out whole, with random starts of their own, so that the records are those of one process. A process
that is killed loses the batch that it held; whoever goes on does that again.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cure_plugin.certification.record import Record, beside, start_results, whole_results
from cure_plugin.checks import check_count
from cure_plugin.errors import DataError, SpecError

_POLL = 0.2
"""Seconds between two looks at whether all are done."""


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 1) of ``count``: every ``count``-th batch, for processes that know nothing of each other.

    Raises:
        SpecError: no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        check_count("count of shards", self.count, 1)
        check_count("number of a shard", self.number, 1)
        if self.number > self.count:
            raise SpecError(f"shard {self.number}/{self.count} is not there; they are numbered 1 to {self.count}")

    @staticmethod
    def read(text: str) -> Shard:
        """``2/8`` as a shard.

        Raises:
            SpecError: written otherwise, or no such part.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found:
            raise SpecError(f"a shard is written number/count, as 1/4, got {text!r}")
        return Shard(*map(int, found.groups()))

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.number}-of-{self.count}"

    def take(self, batches: Sequence[int]) -> Iterable[int]:
        """Its batches."""
        return batches[self.number - 1 :: self.count]

    def finish(self) -> bool:
        """Whether it puts all parts together: nobody tells it when they are there."""
        return False


class Ranks:
    """The processes that ``torchrun`` has started: each takes the next batch that nobody has, from a shared counter."""

    def __init__(self) -> None:
        store, self._rank, self._size = next(rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"cure_plugin/{attempt}", store)

    @staticmethod
    def started() -> bool:
        """Whether there are several."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    @property
    def name(self) -> str:
        """Of this one's file."""
        return f"{self._rank + 1}-of-{self._size}"

    def take(self, batches: Sequence[int]) -> Iterator[int]:
        """One batch after the other."""
        while (place := self._store.add("next", 1) - 1) < len(batches):
            yield batches[place]

    def finish(self) -> bool:
        """Wait, in the first process, until all are done; whether this is the one that puts the parts together."""
        self._store.add("done", 1)
        while self._rank == 0 and self._store.add("done", 0) < self._size:
            time.sleep(_POLL)
        return self._rank == 0


class Parts:
    """A results file that comes in parts, ``results.jsonl.part-2-of-8``, which stand beside it until all are there.

    Args:
        path: of the results file. settings: of the run. batch_size, total: images of a batch, and in all.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], batch_size: int, total: int) -> None:
        self.path, self.settings = path, settings
        self._batch_size, self._total = batch_size, total

    def known(self) -> dict[int, Record]:
        """Image -> record of whole batches, of the results file and all parts.

        Raises:
            DataError: results of other settings, or damaged files.
        """
        found = {record.index: record for record in whole_results(self.path, self.settings)}
        for part in part_files(self.path):
            found.update((record.index, record) for record in self._part(part))
        return self._whole(found)

    def begin(self, known: Mapping[int, Record]) -> dict[int, Record]:
        """Write the results file anew, of what is ``known`` from the first image on without a gap; what that is."""
        kept = {index: known[index] for index in itertools.takewhile(known.__contains__, range(self._total))}
        start_results(self.path, list(kept.values()), self.settings)
        return kept

    def begin_part(self, name: str) -> Path:
        """The file of one part, of the whole batches that it holds."""
        part = beside(self.path, f"part-{name}")
        kept = self._whole({record.index: record for record in self._part(part)})
        start_results(part, list(kept.values()), self._of_part())
        return part

    def clear(self) -> None:
        """Take the parts away, with what lies beside them."""
        for part in part_files(self.path):
            for file in (part, beside(part, "seconds.jsonl"), beside(part, "settings.json")):
                file.unlink(missing_ok=True)

    def merged(self) -> list[Record]:
        """All records in their order, as the results file has them then; the parts are gone.

        Raises:
            DataError: images that no part has.
        """
        return self.written(self.known())

    def written(self, known: Mapping[int, Record]) -> list[Record]:
        """The same of what is ``known``."""
        missing = [index for index in range(self._total) if index not in known]
        if missing:
            raise DataError(
                f"{len(missing)} of {self._total} images are in no part of {self.path}, the first is {missing[0]}; run "
                "what is missing, as the same command without --shard does"
            )
        records = [known[index] for index in range(self._total)]
        start_results(self.path, records, self.settings)
        self.clear()
        return records

    @staticmethod
    def found(path: Path) -> Parts:
        """The parts that stand beside ``path``, by the settings that they say they are of.

        Raises:
            DataError: none, or of settings that cannot be read.
        """
        files = part_files(path)
        if not files:
            raise DataError(f"no parts of {path} are there; cure certify --shard 1/2 --out {path.parent} makes one")
        settings = beside(files[0], "settings.json")
        try:
            told = json.loads(settings.read_text(encoding="utf-8"))
            total, batch_size = int(told.pop("total")), int(told["batch_size"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"cannot read {settings}: {error}; run that part again") from error
        return Parts(path, told, batch_size, total)

    def _part(self, part: Path) -> list[Record]:
        return whole_results(part, self._of_part(), part=True)

    def _of_part(self) -> dict[str, Any]:
        return {**self.settings, "total": self._total}

    def _whole(self, found: Mapping[int, Record]) -> dict[int, Record]:
        """What is of batches that are there whole, in order."""
        size, whole = self._batch_size, dict[int, Record]()
        for start in range(0, self._total, size):
            batch = range(start, min(start + size, self._total))
            if all(index in found for index in batch):
                whole.update((index, found[index]) for index in batch)
        return whole


def merge_parts(paths: Sequence[Path], out: Path) -> list[Record]:
    """All records of parts that stand beside several results files, as ``out`` has them then.

    Raises:
        DataError: no parts, parts of different runs, or images that no part has.
    """
    found = [Parts.found(path) for path in paths]
    for other in found[1:]:
        if other.settings != found[0].settings or other._total != found[0]._total:
            raise DataError(f"parts of {other.path} and {found[0].path} are of different nets, images, sets or methods")
    known = {index: record for parts in found for index, record in parts.known().items()}
    return Parts(out, found[0].settings, found[0]._batch_size, found[0]._total).written(known)


def part_files(path: Path) -> list[Path]:
    """The parts that stand beside a results file."""
    name = re.compile(re.escape(path.name) + r"\.part-\d+-of-\d+")
    return sorted(other for other in path.parent.glob(f"{path.name}.part-*") if name.fullmatch(other.name))
