"""Certification on several processes: the records of one, whatever was killed, and what is missing said."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cure_plugin.certification import Certifier, certify_dataset
from cure_plugin.certification.dataset import certify_shard
from cure_plugin.certification.record import read_results
from cure_plugin.certification.shards import Parts, Shard, merge_parts, part_files
from cure_plugin.checkpoint import save_checkpoint
from cure_plugin.cli import main
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import DataError, SpecError
from cure_plugin.nets import NetSpec, build_net

SETS = ["linf=0.01", "l2=0.1"]


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("mnist-slice", False).first(23)


@pytest.fixture(scope="module")
def certifier() -> Certifier:
    net = build_net(NetSpec("cnn_tiny", (1, 28, 28)), torch.Generator().manual_seed(0))
    return Certifier(net, (1, 28, 28), ["IBP", "CROWN"], batch_size=4)


def test_parts_together_are_the_whole(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    whole = certify_dataset(certifier, data, SETS, tmp_path / "whole" / "results.jsonl")
    for number in (2, 1, 3):
        folder = tmp_path / f"part{number % 2}"
        assert certify_shard(certifier, data, SETS, folder / "results.jsonl", Shard(number, 3)) is None
    paths = [tmp_path / f"part{number}" / "results.jsonl" for number in (0, 1)]
    records = merge_parts(paths, tmp_path / "out" / "results.jsonl")
    assert [one.untimed() for one in records] == [one.untimed() for one in whole]
    for name in ("results.jsonl", "results.jsonl.settings.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_takes_in_parts_of_any_number(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    whole = certify_dataset(certifier, data, SETS)
    certify_shard(certifier, data, SETS, path, Shard(2, 3))
    done = {record.index for record in Parts.found(path).known().values()}
    assert done == {4, 5, 6, 7, 16, 17, 18, 19}
    certify_shard(certifier, data, SETS, path, Shard(1, 2))  # of batches 0, 8, 16 the first two are left
    assert len(Parts.found(path).known()) == 16 and len(part_files(path)) == 2
    records = certify_dataset(certifier, data, SETS, path)
    assert [one.untimed() for one in records] == [one.untimed() for one in whole]
    assert read_results(path) == [one.untimed() for one in whole] and part_files(path) == []


def test_a_torn_part_loses_its_last_batch(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    certify_shard(certifier, data, SETS, path, Shard(1, 2))
    (part,) = part_files(path)
    part.write_bytes(part.read_bytes()[:-30])
    assert len(Parts.found(path).known()) == 8  # of 12: batches at 0, 8, 16
    certify_shard(certifier, data, SETS, path, Shard(1, 2))
    certify_shard(certifier, data, SETS, path, Shard(2, 2))
    assert len(merge_parts([path], path)) == 23


def test_what_does_not_fit_is_said(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    path, other = tmp_path / "a" / "results.jsonl", tmp_path / "b" / "results.jsonl"
    with pytest.raises(DataError, match="no parts of"):
        merge_parts([path], path)
    certify_shard(certifier, data, SETS, path, Shard(1, 2))
    with pytest.raises(DataError, match=r"11 of 23 images are in no part .* the first is 4"):
        merge_parts([path], path)
    certify_shard(certifier, data, SETS[:1], other, Shard(2, 2))
    with pytest.raises(DataError, match="different nets, images, sets or methods"):
        merge_parts([path, other], path)
    with pytest.raises(DataError, match="other settings"):
        certify_shard(certifier, data, SETS[:1], path, Shard(1, 2))
    for text in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(SpecError, match="shard"):
            Shard.read(text)


def saved_net(tmp_path: Path) -> Path:
    spec = NetSpec("cnn_tiny", (1, 28, 28))
    save_checkpoint(tmp_path / "net.pt", spec, build_net(spec, torch.Generator().manual_seed(0)))
    return tmp_path / "net.pt"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = saved_net(tmp_path), tmp_path / "out"
    arguments = ["certify", str(model), *SETS, "--images", "45", "--methods", "IBP", "--out"]
    assert main([*arguments, str(out), "--shard", "1/2"]) == 0
    assert "part 1-of-2 is in" in capsys.readouterr().out and not (out / "results.jsonl").exists()
    assert main(["merge", str(out)]) == 2
    assert main([*arguments, str(out), "--shard", "2/2"]) == 0
    assert main(["merge", str(out)]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert (out / "results.jsonl").read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 45 * len(SETS)
    assert json.loads((out / "summary.json").read_text())["images"] == 45


def launched(arguments: list[str], restarts: int) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", *launcher, "-m", "cure_plugin", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_torchruns_processes_share_the_images_out(tmp_path: Path) -> None:
    arguments = ["certify", str(saved_net(tmp_path)), "linf=0.01", "--images", "60", "--methods", "IBP,CROWN", "--out"]
    run = launched([*arguments, str(tmp_path / "two")], 0)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said[-2000:]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    for name in ("results.jsonl", "results.jsonl.settings.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not part_files(tmp_path / "two" / "results.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_of_random_ranks_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Each soon after a batch was written, so that 20 come before all is done however slow the machine is."""
    model, out = saved_net(tmp_path), tmp_path / "out"
    arguments = ["certify", str(model), "linf=0.01", "l2=0.1", "R(2)", "--images", "1000"]
    arguments += ["--methods", "IBP,CROWN,coupled", "--out"]  # no clock ends them: verdicts are the same every time
    run = launched([*arguments, str(out)], 20)
    generator, path, before = random.Random(0), out / "results.jsonl", set[int]()
    for _ in range(20):
        ranks = started(run, before)
        written = size_of(path)
        while size_of(path) == written:
            assert run.poll() is None, "it ended before"
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 0.2))
        os.kill(generator.choice(sorted(ranks)), signal.SIGKILL)
        before = ranks
    said, _ = run.communicate(timeout=900)
    assert run.returncode == 0, said[-2000:]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    assert path.read_bytes() == (tmp_path / "one" / "results.jsonl").read_bytes()


def started(run: subprocess.Popen[str], before: set[int]) -> set[int]:
    """Both processes, once they are others than those ``before``."""
    while run.poll() is None:
        found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=False)
        ranks = set(map(int, found.stdout.split()))
        if len(ranks) == 2 and not ranks & before:
            return ranks
        time.sleep(0.05)
    raise AssertionError("it ended before")


def size_of(path: Path) -> int:
    """Bytes of all parts."""
    return sum(part.stat().st_size for part in part_files(path))
