"""Proofs as files: what was proved is checked, and what was tampered with is not."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_branch_and_bound import NETS, SETS, drawn
from torch import nn

from cure_plugin.certification import BranchAndBound, Certifier
from cure_plugin.cli import main
from cure_plugin.datasets import load_data
from cure_plugin.errors import DataError, SpecError
from cure_plugin.export import export_onnx
from cure_plugin.proofs import Checked, Question, check_proofs, write_proofs
from cure_plugin.proofs.checker import ImageProof, covers
from cure_plugin.relaxation import search
from cure_plugin.relaxation.optimise import Ascent
from cure_plugin.sets import PerturbationLpBall, set_spec

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


def written(path: Path, name: str, kind: str, seed: int, size: float = 0.2) -> bool:
    net, x, y = drawn(name, seed)
    certifier = Certifier(net, (1, 3, 3))
    return write_proofs(path, certifier, [Question("0", x, y, SETS[kind](size))], BranchAndBound(5, nodes=2000))[0]


def rewritten(path: Path, change: Callable[[Arrays], None]) -> Checked:
    """What is said of the file after a ``change``."""
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    change(arrays)
    changed = path.with_name("changed.npz")
    np.savez(changed, allow_pickle=False, **arrays)
    return next(check_proofs(changed))


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", NETS)
def test_proofs_are_checked(tmp_path: Path, name: str, kind: str) -> None:
    found = [written(tmp_path / f"{seed}.npz", name, kind, seed) for seed in range(4)]
    assert any(found)
    for seed in range(4):
        if found[seed]:
            (checked,) = check_proofs(tmp_path / f"{seed}.npz")
            assert checked.fault == "" and checked.bound > 0 and checked.leaves >= 2
        else:
            with pytest.raises(DataError, match="holds no proof"):
                list(check_proofs(tmp_path / f"{seed}.npz"))


def wider_set(arrays: Arrays) -> None:
    for end in ("low", "high"):
        arrays[f"image/0/{end}"] = arrays[f"image/0/{end}"] * 1.5
    arrays["image/0/eps"] = arrays["image/0/eps"] * 1.5


def without_a_leaf(arrays: Arrays) -> None:
    for part in ("class", "signs", "slopes", "splits", "multipliers", "budget"):
        arrays[f"image/0/leaf/{part}"] = arrays[f"image/0/leaf/{part}"][1:]


def flipped_sign(arrays: Arrays) -> None:
    signs = arrays["image/0/leaf/signs"]
    row, column = np.argwhere(signs != 0)[0]
    signs[row, column] *= -1


def narrower_box(arrays: Arrays) -> None:
    arrays["image/0/upper/2"] = np.minimum(arrays["image/0/upper/2"], 0)


def claimed_active(arrays: Arrays) -> None:
    arrays["image/0/lower/1"] = np.maximum(arrays["image/0/lower/1"], 0)


def other_label(arrays: Arrays) -> None:
    arrays["image/0/label"] = (arrays["image/0/label"] + 1) % 3


def other_bias(arrays: Arrays) -> None:
    arrays["net/3/bias"][int(arrays["image/0/label"])] -= 3


def not_numbers(arrays: Arrays) -> None:
    arrays["image/0/leaf/slopes"][:] = np.nan


CHANGES = (
    wider_set,
    without_a_leaf,
    flipped_sign,
    narrower_box,
    claimed_active,
    other_label,
    other_bias,
    not_numbers,
)


@pytest.fixture(scope="module", params=["linf", "l2", "l1"])
def with_splits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Proofs that needed splits."""
    folder, found = tmp_path_factory.mktemp(request.param), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_ROOT", Ascent(1))
        for number, (seed, size) in enumerate(itertools.product(range(12), (0.1, 0.2, 0.3))):
            path = folder / f"{number}.npz"
            if len(found) < 3 and written(path, "mlp", request.param, seed, size):
                with np.load(path) as file:
                    found += [path] if bool((file["image/0/leaf/signs"] != 0).any()) else []
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_tampered_with_is_no_proof(with_splits: list[Path], change: Callable[[Arrays], None]) -> None:
    assert len(with_splits) == 3
    for path in with_splits:
        assert rewritten(path, change).fault


def test_bounds_of_leaves_hold_at_their_points(with_splits: list[Path]) -> None:
    """As the checker computes them, of the numbers in the file and of random ones; points lie where their signs are."""
    met, generator = 0, np.random.default_rng(0)
    for path in with_splits:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        net = [({k - 1: arrays[f"net/{k}/{k - 1}"]}, arrays[f"net/{k}/bias"]) for k in (1, 2, 3)]
        read = {name.removeprefix("image/0/"): value for name, value in arrays.items()}
        proof = ImageProof(net, read)
        proof.check()
        ball = PerturbationLpBall(proof.p, proof.eps or float(proof.high.max()))
        x = torch.from_numpy(proof.x).view(1, 1, 3, 3).expand(2000, 1, 3, 3)
        values = [
            proof.values(point) for point in ball.around(x).sample(torch.Generator().manual_seed(0)).flatten(1).numpy()
        ]
        signs = np.concatenate(
            [
                np.sign(np.array([value[k] for value in values])[:, layer.kept[: layer.unstable]])
                for k, layer in enumerate(proof.layers)
            ],
            1,
        )
        logits = np.array([value[-1] for value in values])
        weights, bias = proof._rows(3)
        for leaf, (j, asked) in enumerate(zip(read["leaf/class"], read["leaf/signs"], strict=True)):
            over = {i: (w[proof.label] - w[j])[None] for i, w in weights.items()}
            numbers = proof._numbers("leaf", slice(leaf, leaf + 1))
            moved = [one + generator.normal(0, 0.5, one.shape) * (number < 2) for number, one in enumerate(numbers)]
            margin = np.array([bias[proof.label] - bias[j]])
            bound = max(proof._bound(over, margin, one, asked[None])[0] for one in (numbers, moved))
            inside = ((asked == 0) | (asked == signs)).all(1)
            met += int(inside.sum())
            assert (logits[inside, proof.label] - logits[inside, j] >= bound - 1e-9).all()
    assert met > 1000


@pytest.mark.parametrize("kind", SETS)
def test_any_numbers_in_a_file_give_bounds_that_hold(tmp_path: Path, kind: str) -> None:
    """Random numbers may prove less, never what is false."""
    generator = np.random.default_rng(0)

    def random(arrays: Arrays) -> None:
        for name in arrays:
            if name.endswith(("slopes", "splits")):
                arrays[name] = arrays[name] + generator.normal(0, 0.3, arrays[name].shape)
            elif name.endswith(("multipliers", "budget")):
                arrays[name] = arrays[name] * generator.uniform(0.3, 3, arrays[name].shape)

    for seed in range(4):
        path = tmp_path / f"{seed}.npz"
        if written(path, "mlp", kind, seed, 0.1):
            checked = rewritten(path, random)
            net, x, y = drawn("mlp", seed)
            points = SETS[kind](0.1).around(x.expand(500, 1, 3, 3)).sample(torch.Generator().manual_seed(seed))
            with torch.no_grad():
                logits = net(points)
            margins = logits.gather(1, y.expand(500, 1)) - logits.scatter(1, y.expand(500, 1), -torch.inf)
            assert checked.fault or checked.bound <= float(margins.min()) + 1e-5


def test_what_covers_all_signs() -> None:
    assert covers(np.array([[0, 0]])) and covers(np.array([[1, 0], [-1, 1], [-1, -1]]))
    assert covers(np.array([[1, 0], [-1, 0], [0, 1]][:2])) and covers(np.zeros((1, 0)))
    for faulty in ([[1, 0]], [[1, 0], [-1, 1]], [[1, 1], [-1, -1]], [[1, 0], [0, 1]], [[2, 0], [-1, 0]]):
        assert not covers(np.array(faulty))
    assert not covers(np.zeros((0, 2)))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip file"])
def test_files_that_are_none_are_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "proof.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no proof file"):
        list(check_proofs(path))
    with pytest.raises(DataError, match="no proof file"):
        list(check_proofs(tmp_path / "missing.npz"))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "proof.npz"
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([object()]), allow_pickle=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/layers.npy", stream.getvalue())
    with pytest.raises(DataError, match="no proof file"):
        list(check_proofs(path))


def test_what_no_proof_can_be_written_of_is_refused(tmp_path: Path) -> None:
    net, x, y = drawn("mlp", 0)
    certifier, path = Certifier(net, (1, 3, 3)), tmp_path / "proof.npz"
    with pytest.raises(SpecError, match="lp balls and boxes"):
        write_proofs(path, certifier, [Question("0", x, y, set_spec("patch=1x1").build())])
    with pytest.raises(SpecError, match="a name of its own"):
        write_proofs(path, certifier, [Question("0", x, y, SETS["l2"](0.1))] * 2)
    smooth = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    with pytest.raises(SpecError, match="ReLUs only"):
        write_proofs(path, Certifier(smooth.eval(), (1, 3, 3)), [Question("0", x, y, SETS["l2"](0.1))])
    assert not list(tmp_path.iterdir())


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a net to proofs, and these against its ONNX file and another's."""
    files = [tmp_path / f"{seed}.onnx" for seed in range(2)]
    for seed, path in enumerate(files):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
        with torch.no_grad():
            net[3].bias[load_data("mnist-slice", False).labels[0]] += 5
        export_onnx(net, (1, 28, 28), path)
    proof = tmp_path / "proof.npz"
    arguments = ["linf=0.001", "l2=0.001", "l1=0.001", "patch=1x1", "--images", "3", "--timeout", "5"]
    assert main(["certify", str(files[0]), *arguments, "--out", str(tmp_path / "out"), "--proof", str(proof)]) == 0
    told = capsys.readouterr()
    assert "leaves patch" in told.err and "proofs: 3 of 3" in told.out
    assert main(["check", "--proof", str(proof), "--onnx", str(files[0])]) == 0
    assert "no proof" not in capsys.readouterr().out
    assert main(["check", "--proof", str(proof), "--onnx", str(files[1])]) == 3
    assert "another net" in capsys.readouterr().out
    assert main(["check"]) == 2
    assert "--proof FILE" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_a_layer_that_is_never_active_is_no_fault(tmp_path: Path, kind: str) -> None:
    net, x, y = drawn("mlp", 0)
    assert isinstance(net, nn.Sequential)
    with torch.no_grad():
        net[1].bias -= 100
        y = net(x).argmax(1)
    proof = tmp_path / "proof.npz"
    assert write_proofs(proof, Certifier(net, (1, 3, 3)), [Question("0", x, y, SETS[kind](0.1))]) == [True]
    assert next(check_proofs(proof)).fault == ""
