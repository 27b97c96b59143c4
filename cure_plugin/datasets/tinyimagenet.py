"""TinyImageNet's folders of JPEG files (needs Pillow)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cure_plugin.errors import DataError, MissingDependencyError


def read_tinyimagenet(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """(images (N, 3, 64, 64) uint8, labels (N,) int64); the test split is the validation folder.

    Classes are numbered in the order of their sorted WordNet ids, as torchvision's ``ImageFolder`` does.
    """
    try:
        listed = _train_files(folder) if train else _validation_files(folder)
    except OSError as error:
        raise DataError(f"cannot list TinyImageNet in {folder}: {error}") from error
    if not listed:
        raise DataError(f"no images under {folder}; expected {'train/*/images' if train else 'val/images'}")
    ids = sorted({wordnet_id for _, wordnet_id in listed}) if train else _all_ids(folder, listed)
    number = {wordnet_id: index for index, wordnet_id in enumerate(ids)}
    images = np.stack([_decode(path) for path, _ in listed])
    labels = torch.tensor([number[wordnet_id] for _, wordnet_id in listed])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def read_tinyimagenet_val(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """A split of the validation images alone, where the training images are not at hand: every fifth is for testing."""
    images, labels = read_tinyimagenet(folder, False)
    chosen = (torch.arange(len(labels)) % 5 == 4) != train
    return images[chosen], labels[chosen]


def _train_files(folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.parent.parent.name) for path in sorted(folder.glob("train/*/images/*.JPEG"))]


def _validation_files(folder: Path) -> list[tuple[Path, str]]:
    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    return [(folder / "val" / "images" / row[0], row[1]) for row in rows if len(row) > 1]


def _all_ids(folder: Path, listed: list[tuple[Path, str]]) -> list[str]:
    """The 200 class ids: from wnids.txt where it is there, else from the labels themselves."""
    path = folder / "wnids.txt"
    return sorted(path.read_text().split()) if path.exists() else sorted({wordnet_id for _, wordnet_id in listed})


def _decode(path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("TinyImageNet needs Pillow to decode JPEG files: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"cannot decode {path}: {error}; fetch the file again") from error
