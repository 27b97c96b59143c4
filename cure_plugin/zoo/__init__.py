"""Trained nets that ship inside the package, each with its checksum and the figures measured of it.

``zoo:NAME`` stands for one wherever the path of a checkpoint is asked for; :func:`cure_plugin.load_net` takes the
bare ``NAME`` too.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cure_plugin.errors import CheckpointError
from cure_plugin.json_files import read_record

PREFIX = "zoo:"
"""In front of a name, it makes a path of it."""

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class ZooNet:
    """A net of the zoo.

    Attributes:
        file: checkpoint in this folder. sha256: of its bytes, in hexadecimal.
        net, data: what it is, and of which data set. recipe, seed: what trained it.
        images: first test images of ``data`` that the figures are of.
        clean, certified, union: shares of them in [0, 1]; ``certified`` by set, e.g. ``{"linf=0.1": 0.89}``.
        ledger: the run's file below ``benchmarks/results``.
    """

    file: str
    sha256: str
    net: str
    data: str
    recipe: str
    seed: int
    images: int
    clean: float
    certified: dict[str, float]
    union: float
    ledger: str


@dataclass(frozen=True)
class Index:
    """``index.json``: the nets by their names."""

    nets: dict[str, ZooNet]


@functools.cache
def zoo_nets() -> dict[str, ZooNet]:
    """The nets by their names, such as ``mnist_small/union``."""
    return read_record((FOLDER / "index.json").read_text(encoding="utf-8"), Index).nets


def zoo_path(name: str) -> Path:
    """The checkpoint of the net of that name, its bytes compared with its checksum.

    Raises:
        CheckpointError: no net of that name (the message lists them), or its file is missing or damaged.
    """
    found = zoo_nets().get(name)
    if found is None:
        raise CheckpointError(f"the zoo has no net {name!r}; known: {', '.join(zoo_nets())}")
    path = FOLDER / found.file
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {PREFIX}{name}: {error}; install cure_plugin anew") from error
    if digest != found.sha256:
        raise CheckpointError(f"{PREFIX}{name} is damaged: {path} has another checksum; install cure_plugin anew")
    return path


def resolved(path: str | Path) -> Path:
    """The file that a path stands for: ``zoo:NAME`` the zoo's, and so a bare ``NAME`` where no file is called that.

    Raises:
        CheckpointError: see :func:`zoo_path`.
    """
    text = str(path)
    if text.startswith(PREFIX):
        return zoo_path(text.removeprefix(PREFIX))
    return zoo_path(text) if text in zoo_nets() and not Path(text).exists() else Path(path)
