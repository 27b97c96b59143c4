"""Real image data by name: a shipped MNIST slice, and full sets in torchvision's folder layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cure_plugin.checks import check_count
from cure_plugin.datasets.cifar import read_cifar10
from cure_plugin.datasets.idx import read_mnist
from cure_plugin.datasets.tinyimagenet import read_tinyimagenet, read_tinyimagenet_val
from cure_plugin.errors import DataError, SpecError
from cure_plugin.inputs import check_labels

__all__ = ["DATASETS", "ImageData", "load_data"]

_SLICE_FOLDER = Path(__file__).parent / "mnist_slice"


@dataclass(frozen=True)
class ImageData:
    """Labelled images.

    Attributes:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        classes: number of classes.

    Raises:
        SpecError: images of another kind or shape, or labels that are none of so many classes.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8 or self.images.ndim != 4:
            found = type(self.images).__name__
            if isinstance(self.images, Tensor):
                found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise SpecError(f"images must be uint8 (N, C, H, W), got {found}; give (255 * x).round().byte()")
        check_count("classes", self.classes, 2)
        check_labels(self.labels, self.classes, len(self.images))

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return int(channels), int(height), int(width)

    def batch(self, indices: Tensor | slice, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(pixels in [0, 1] as float32, labels) of the chosen images."""
        pixels = self.images[indices].to(device=device, dtype=torch.float32) / 255
        return pixels, self.labels[indices].to(device)

    def digest(self) -> str:
        """SHA-256 of images and labels in their order, to tell data apart."""
        content = hashlib.sha256()
        for part in (self.images, self.labels):
            content.update(part.cpu().contiguous().numpy().data)
        return content.hexdigest()

    def centre_crop(self, height: int, width: int) -> ImageData:
        """The middle of every image; itself where that is all of it.

        Raises:
            SpecError: larger than the images, or smaller than one pixel.
        """
        if not (1 <= height <= self.shape[1] and 1 <= width <= self.shape[2]):
            raise SpecError(f"cannot cut {height} x {width} out of images of {self.shape[1]} x {self.shape[2]}")
        top, left = (self.shape[1] - height) // 2, (self.shape[2] - width) // 2
        return ImageData(self.images[:, :, top : top + height, left : left + width], self.labels, self.classes)

    def first(self, count: int) -> ImageData:
        """The first ``count`` images.

        Raises:
            SpecError: ``count`` is not between 1 and the number of images.
        """
        if not 1 <= count <= len(self):
            raise SpecError(f"asked for the first {count} images, but there are {len(self)}; choose 1 to {len(self)}")
        return ImageData(self.images[:count], self.labels[:count], self.classes)


def _read_slice(_: Path, train: bool) -> tuple[Tensor, Tensor]:
    return read_mnist(_SLICE_FOLDER, train)


_Reader = Callable[[Path, bool], tuple[Tensor, Tensor]]

DATASETS: dict[str, tuple[str, _Reader, int]] = {
    "mnist-slice": ("", _read_slice, 10),
    "mnist": ("MNIST/raw", read_mnist, 10),
    "cifar10": ("cifar-10-batches-py", read_cifar10, 10),
    "tinyimagenet": ("tiny-imagenet-200", read_tinyimagenet, 200),
    "tinyimagenet-val": ("tiny-imagenet-200", read_tinyimagenet_val, 200),
}
"""Name -> (folder below the data root, reader, classes)."""


def load_data(name: str, train: bool, root: str | Path | None = None) -> ImageData:
    """Load one split of a data set.

    Args:
        name: a key of :data:`DATASETS`; ``mnist-slice`` ships with the package (10,000 training and
            1,000 test images) and needs no root. ``tinyimagenet-val`` splits TinyImageNet's 10,000 validation images
            alone, 8,000 for training, and is no result on TinyImageNet.
        train: the training split, else the test (TinyImageNet: validation) split.
        root: folder in torchvision's layout; default: the environment variable ``CURE_DATA``.

    Raises:
        SpecError: an unknown name.
        DataError: no root given, or a folder or file that is missing, truncated or malformed.
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise SpecError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    subfolder, reader, classes = DATASETS[name]
    folder = Path()
    if subfolder:
        base = root or os.environ.get("CURE_DATA")
        if not base:
            raise DataError(f"data set {name!r} needs a folder: pass --data FOLDER or set CURE_DATA")
        folder = Path(base) / subfolder
        if not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist; {name!r} is looked for there (torchvision's layout)")
    images, labels = reader(folder, train)
    if len(images) != len(labels):
        raise DataError(f"{name} in {folder}: {len(images)} images but {len(labels)} labels; the files do not match")
    return ImageData(images, labels, classes)
