"""Data: the shipped slice is real MNIST; full sets are read safely; faults are named."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from cure_plugin.datasets import load_data
from cure_plugin.errors import DataError, SpecError


def test_the_shipped_slice() -> None:
    train, test = load_data("mnist-slice", True), load_data("mnist-slice", False)
    assert (len(train), len(test), train.shape) == (10_000, 1_000, (1, 28, 28))
    assert train.labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    x, y = test.batch(slice(0, 3))
    assert x.dtype == torch.float32 and float(x.min()) == 0 and float(x.max()) == 1 and y.tolist() == [7, 2, 1]


def write_idx(path: Path, array: np.ndarray) -> bytes:
    content = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return content


def make_mnist(root: Path, suffix: str = ".gz") -> Path:
    raw = root / "MNIST" / "raw"
    write_idx(raw / f"t10k-images-idx3-ubyte{suffix}", np.arange(2 * 28 * 28).reshape(2, 28, 28) % 256)
    write_idx(raw / f"t10k-labels-idx1-ubyte{suffix}", np.array([3, 4]))
    return raw


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_mnist_in_the_standard_layout(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mnist(tmp_path, suffix)
    monkeypatch.setenv("CURE_DATA", str(tmp_path))
    data = load_data("mnist", train=False)
    assert data.labels.tolist() == [3, 4] and data.images.shape == (2, 1, 28, 28)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = make_mnist(tmp_path) / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="t10k-images"):
        load_data("mnist", False, tmp_path)


def test_a_cut_body_is_named(tmp_path: Path) -> None:
    path = make_mnist(tmp_path, "") / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated"):
        load_data("mnist", False, tmp_path)


def test_faults_of_place_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CURE_DATA", raising=False)
    with pytest.raises(DataError, match="--data FOLDER or set CURE_DATA"):
        load_data("mnist", False)
    with pytest.raises(DataError, match="does not exist"):
        load_data("cifar10", False, tmp_path)
    with pytest.raises(SpecError, match="unknown data set 'mnits'"):
        load_data("mnits", False)
    with pytest.raises(SpecError, match="choose 1 to 1000"):
        load_data("mnist-slice", False).first(0)


def test_cifar_batches_are_read_without_trusting_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {b"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), b"labels": [1, 9]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    data = load_data("cifar10", False, tmp_path)
    assert data.shape == (3, 32, 32) and data.labels.tolist() == [1, 9]
    assert int(data.images[0, 0, 0, 5]) == 5

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("1/0",))

    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataError, match=r"builtins\.eval"):
        load_data("cifar10", False, tmp_path)


def tiny_images(root: Path, count: int, side: int = 64) -> Path:
    """Validation images of two classes, the i-th of brightness i."""
    image_module = pytest.importorskip("PIL.Image")
    folder = root / "tiny-imagenet-200" / "val" / "images"
    folder.mkdir(parents=True)
    for index in range(count):
        image_module.new("L", (side, side), index).save(folder / f"val_{index}.JPEG")
    lines = [f"val_{index}.JPEG\tn0{index % 2}\t0\t0\t1\t1\n" for index in range(count)]
    (folder.parent / "val_annotations.txt").write_text("".join(lines))
    (folder.parent.parent / "wnids.txt").write_text("n00\nn01\n")
    return root


def test_a_split_of_tinyimagenets_validation_images(tmp_path: Path) -> None:
    root = tiny_images(tmp_path, 10)
    train, test = (load_data("tinyimagenet-val", part, root) for part in (True, False))
    assert test.images[:, 0, 0, 0].tolist() == [4, 9] and test.labels.tolist() == [0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and train.classes == 200


def test_tinyimagenet_validation_folder(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    folder = tmp_path / "tiny-imagenet-200" / "val" / "images"
    folder.mkdir(parents=True)
    image_module.new("L", (64, 64), 255).save(folder / "val_0.JPEG")
    (folder.parent / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t1\t1\n")
    (folder.parent.parent / "wnids.txt").write_text("n03\nn02\nn01\n")
    data = load_data("tinyimagenet", False, tmp_path)
    assert data.shape == (3, 64, 64) and data.labels.tolist() == [1] and int(data.images.min()) > 250
    (folder / "val_0.JPEG").write_bytes(b"no jpeg")
    with pytest.raises(DataError, match="cannot decode"):
        load_data("tinyimagenet", False, tmp_path)
