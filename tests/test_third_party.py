"""Nets of other papers, and another verifier beside us, on a net whose answers are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cure_plugin.errors import DataError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_third_party
import ledger

ANSWERS = {"start": "unsat", "0": "unsat", "1": "timeout"}
"""Of the other verifier, by the question's name."""

VERIFIER = """import os, sys
from pathlib import Path
with open({calls!r}, "a") as file:
    file.write(f"{{Path(sys.argv[1]).stem}} {{sys.argv[3]}} {{os.environ['OMP_NUM_THREADS']}}\\n")
Path(sys.argv[2]).write_text({answers!r}[Path(sys.argv[1]).stem])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A net that finds class 0 where pixels sum to more than 2; images: proved, falsified, misclassified."""
    net = {"layers": ["flatten", "linear 4 2"], "images": "images.pt", "mean": None, "norm": "inf", "eps": "0.1"}
    nets = {"sums": net, "sums_l2": {**net, "norm": "2"}}
    (tmp_path / "nets.json").write_text(json.dumps(nets))
    for name in nets:
        torch.save(
            {"w": torch.tensor([[1.0], [-1.0]]).expand(2, 4), "b": torch.tensor([-2.0, 2.0])}, tmp_path / f"{name}.pt"
        )
    pixels = torch.tensor([0.9, 0.55, 0.1]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    torch.save({"images": pixels, "labels": torch.zeros(3)}, tmp_path / "images.pt")
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], *names: str) -> list[str]:
    """The calls of a verifier with these answers, asked beside us."""
    calls, script, verifier = (folder / name for name in ("calls.txt", "other.py", "other.yaml"))
    script.write_text(VERIFIER.format(calls=str(calls), answers=answers))
    command = [sys.executable, str(script), "{vnnlib}", "{results}", "{category}"]
    verifier.write_text(json.dumps({"name": "other", "run": command}))
    arguments = ["--nets", str(folder), "--out", str(folder / "out"), "--beside", str(verifier), "--record"]
    monkeypatch.setattr(ledger, "RESULTS", folder / "results")
    monkeypatch.setattr(sys, "argv", ["bench_third_party.py", *names, *arguments])
    assert bench_third_party.main() == 0
    return calls.read_text().splitlines()


def test_another_verifier_is_asked_the_same_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the second goes on after the last image
        calls = run(folder, monkeypatch, ANSWERS)
        assert calls == [f"{name} sums {torch.get_num_threads()}" for name in ANSWERS]
    rows = json.loads((folder / "results" / "third_party.json").read_text())["figures"]["rows"]
    assert [(row["net"], row.get("by")) for row in rows] == [("sums", None), ("sums", "other"), ("sums_l2", None)]
    assert [[row[key] for key in ("proved", "falsified", "open")] for row in rows[:2]] == [[1, 2, 0], [1, 1, 1]]
    assert rows[1]["start"] > 0 and rows[1]["seconds"] >= 0 and rows[0]["limit"] == rows[1]["limit"]
    text = ledger.third_party_table()
    assert "| sums | linf=0.1 | 3 | other | 33.3 | 33.3 | 33.3 | - |" in text and "Seconds of other do not" in text


def test_a_point_that_does_not_hold_is_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "sat\n" + "".join(f"(X_{index} 0.9)" for index in range(4))
    run(folder, monkeypatch, {**ANSWERS, "0": wrong}, "sums")
    row = json.loads((folder / "results" / "third_party.json").read_text())["figures"]["rows"][1]
    assert (row["proved"], row["falsified"], row["open"]) == (0, 1, 2)


@pytest.mark.parametrize(
    "answers, message",
    [
        ({"1": "unsat"}, r"image 1: other says proved, we say falsified \(pgd\); both cannot be true"),
        ({"0": "what"}, "other fails on .*0.csv: .* starts with 'what'"),
    ],
)
def test_contradictions_and_failures_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(folder, monkeypatch, {**ANSWERS, **answers}, "sums")
    assert not (folder / "results").exists()
