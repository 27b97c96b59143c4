"""Certification: no certificate contradicts an attack, records resume, figures match recomputation."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cure_plugin import PerturbationLpBall
from cure_plugin.attacks import Pgd, pgd, worst_margin_loss
from cure_plugin.bounds.coupled import CoupledBounds
from cure_plugin.certification import METHODS, Certifier, Method, certify_dataset, summarize, wilson_interval
from cure_plugin.certification.cascade import applicable
from cure_plugin.certification.curves import certified_curves
from cure_plugin.certification.dataset import union_status
from cure_plugin.checkpoint import load_net
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import DataError, SpecError
from cure_plugin.report import text_table
from cure_plugin.sets import set_spec
from cure_plugin.testing import MethodTestCase
from cure_plugin.training import Trainer, load_recipe

SPECS = [set_spec(text) for text in ("linf=0.05", "l2=0.4", "l1=1.0")]


@pytest.fixture(scope="module")
def net(made_once: Callable[..., Path]) -> nn.Module:
    """A net with all three kinds of verdict, trained for a few seconds."""
    return load_net(made_once("net of all verdicts", train) / "checkpoint.pt")[1]


def train(folder: Path) -> None:
    recipe = load_recipe(
        "demo_cure",
        {
            "sets": [{"set": "linf=0.05", "ratio": 0.4}, {"set": "l2=0.2", "ratio": 1.0}],
            "epochs": 4,
            "ramp_epochs": 2,
            "attack_steps": 3,
            "batch_size": 50,
            "gradient_projection": 0,
        },
    )
    Trainer(recipe, load_data("mnist-slice", True).first(2000), folder).run()


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("mnist-slice", False).first(30)


@pytest.fixture(scope="module")
def certifier(net: nn.Module) -> Certifier:
    return Certifier(net, (1, 28, 28), ("IBP", "CROWN-IBP", "CROWN"), batch_size=8)


def test_no_certificate_contradicts_a_strong_attack(certifier: Certifier, data: ImageData) -> None:
    x, y = data.batch(slice(0, len(data)))
    for spec in SPECS:
        verdicts, points = certifier.decide(x, y, spec.build(), torch.Generator().manual_seed(0))
        statuses = [verdict.status for verdict in verdicts]
        assert "proved" in statuses and "falsified" in statuses
        proved = torch.tensor([status == "proved" for status in statuses])
        margins = torch.tensor([verdict.margin for verdict in verdicts])
        for _ in range(5):
            point = pgd(certifier.net, x, y, spec.build(), Pgd(50, worst_margin_loss))
            reached = -worst_margin_loss(certifier.net(point), y)
            assert bool((reached >= margins - 1e-5)[proved].all())
        broken = torch.tensor([status == "falsified" for status in statuses])
        assert bool((certifier.net(points).argmax(1) != y)[broken].all())
        assert bool(spec.build().contains(x, points, 1e-5).all())


def test_alpha_crown_improves_on_crown(net: nn.Module, data: ImageData) -> None:
    x, y = data.batch(slice(0, 6))
    certifier = Certifier(net, (1, 28, 28), alpha_iterations=5)
    ball = set_spec("l2=0.5").build()
    crown = certifier.lower_bound(x, y, ball, "CROWN")
    alpha = certifier.lower_bound(x, y, ball, "alpha-CROWN")
    assert bool((alpha >= crown - 1e-4).all()) and float(alpha.sum()) > float(crown.sum())


def test_float64_gives_the_same_verdicts(certifier: Certifier, data: ImageData) -> None:
    x, y = data.batch(slice(0, 8))
    single = certifier.proved(x, y, SPECS[1].build())
    net = nn.Sequential(*certifier.net.children())
    double = Certifier(net.double(), (1, 28, 28), certifier.methods).proved(x.double(), y, SPECS[1].build())
    net.float()
    assert torch.equal(single, double)


def test_records_resume_after_a_kill(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    path, times = tmp_path / "results.jsonl", tmp_path / "results.jsonl.seconds.jsonl"
    data = data.first(8)
    whole = certify_dataset(certifier, data, SPECS, path)
    text, clock = path.read_text(), times.read_text()
    lines = text.splitlines(keepends=True)
    for kept in (0, 3, 7):
        path.write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        times.write_text("".join(clock.splitlines(keepends=True)[: kept + 2]))
        again = certify_dataset(certifier, data, SPECS, path)
        assert path.read_text() == text
        assert [record.union for record in again] == [record.union for record in whole]
        assert len(times.read_text().splitlines()) == len(lines)
        assert all(verdict.seconds >= 0 for record in again for verdict in record.sets.values())
    without = certify_dataset(certifier, data, SPECS)
    assert [record.union for record in without] == [record.union for record in whole]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_leave_the_file_of_an_undisturbed_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cure_plugin", "train", "demo_linf", "epochs=1", "ramp_epochs=0"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    sets = ["linf=0.05", "l2=0.3", "R(3)"]
    certify = [sys.executable, "-m", "cure_plugin", "certify", str(tmp_path / "checkpoint.pt"), *sets]
    certify += ["--images", "200", "--methods", "IBP,CROWN,splitting", "--out"]
    started = time.monotonic()
    subprocess.run([*certify, str(tmp_path / "whole")], check=True, capture_output=True)
    undisturbed = time.monotonic() - started
    whole, cut = tmp_path / "whole" / "results.jsonl", tmp_path / "cut" / "results.jsonl"
    rng, kills, finished = random.Random(0), 0, 0
    while kills < 20 or not finished:
        process = subprocess.Popen([*certify, str(tmp_path / "cut")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=rng.uniform(0.1, 1) * undisturbed if kills < 20 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0 and whole.read_text() == cut.read_text()
        finished += 1
        shutil.rmtree(tmp_path / "cut")


def test_damage_that_no_kill_leaves_is_named(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    path, times = tmp_path / "results.jsonl", tmp_path / "results.jsonl.seconds.jsonl"
    certify_dataset(certifier, data.first(3), SPECS[:1], path)
    for file, old, new, said in (
        (path, "proved", "prooved", r"line \d.*'prooved' is none of proved, falsified, undecided"),
        (path, '"index": 1', '"index": 2', "line 2, is no record .image 2 where image 1 belongs"),
        (path, '"union"', '"version": 2, "union"', "line 1, .*keys of another version, version"),
        (times, '"linf"', '"l2"', "line 1, .*not the times of image 0"),
        (times, '"seconds"', "", "line 1, "),
    ):
        whole = file.read_text()
        file.write_text(whole.replace(old, new))
        with pytest.raises(DataError, match=f"{file.name}, {said}.*; delete .*results.jsonl and run again") as caught:
            certify_dataset(certifier, data.first(3), SPECS[:1], path)
        assert "\n" not in str(caught.value)
        file.write_text(whole)
    times.unlink()
    with pytest.raises(DataError, match=r"cannot read results .*seconds.jsonl"):
        certify_dataset(certifier, data.first(3), SPECS[:1], path)


def test_results_of_another_run_are_refused(certifier: Certifier, data: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    certify_dataset(certifier, data.first(4), SPECS[:1], path)
    with pytest.raises(DataError, match="other settings"):
        certify_dataset(certifier, data.first(4), SPECS, path)
    with pytest.raises(SpecError, match="at least one and differ"):
        certify_dataset(certifier, data, [SPECS[0], SPECS[0]])


def test_summary_matches_a_recount(certifier: Certifier, data: ImageData) -> None:
    records = certify_dataset(certifier, data, SPECS)
    summary = summarize(records)
    x, y = data.batch(slice(0, len(data)))
    assert summary.clean == pytest.approx(float((certifier.net(x).argmax(1) == y).float().mean()))
    for spec in SPECS:
        statuses = [r.sets[spec.name].status for r in records]
        assert summary.certified[spec.name] == pytest.approx(statuses.count("proved") / len(data))
        assert summary.certified[spec.name] <= summary.pgd[spec.name] <= summary.clean
    union = [all(v.status == "proved" for v in r.sets.values()) for r in records]
    assert summary.union == pytest.approx(sum(union) / len(data))
    assert summary.union <= min(summary.certified.values())
    low, high = summary.intervals["union"]
    assert low <= summary.union <= high


def test_curves_fall_and_meet_the_summary(certifier: Certifier, data: ImageData) -> None:
    data, factors = data.first(12), (0.0, 0.5, 1.0, 2.0)
    curves = certified_curves(certifier, data, SPECS, factors)
    for shares in curves.values():
        assert list(shares) == sorted(shares, reverse=True)
    x, y = data.batch(slice(0, len(data)))
    assert curves["l2"][2] <= float(certifier.proved(x, y, SPECS[1].build()).float().mean())


def test_union_status() -> None:
    assert union_status(["proved", "proved"]) == "proved"
    assert union_status(["proved", "undecided"]) == "undecided"
    assert union_status(["undecided", "falsified"]) == "falsified"


def test_wilson_interval_by_hand() -> None:
    low, high = wilson_interval(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(0, 0) == (0.0, 1.0)


def test_refusals(net: nn.Module) -> None:
    with pytest.raises(SpecError, match="unknown method 'CRWN'"):
        Certifier(net, (1, 28, 28), ("CRWN",))
    with pytest.raises(SpecError, match="batch_size must be at least 1"):
        Certifier(net, (1, 28, 28), batch_size=0)
    certifier = Certifier(net, (1, 28, 28))
    for x, y, message in (
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), r"x must be \(B, 1, 28, 28\), got \(2, 1, 8, 8\)"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(3), r"y must be \(2,\), one label an image, got \(3,\)"),
    ):
        with pytest.raises(SpecError, match=message):
            certifier.decide(x, y.long(), SPECS[0].build())
    with pytest.raises(SpecError, match="NaN"):
        certifier.decide(torch.full((1, 1, 28, 28), float("nan")), torch.zeros(1).long(), SPECS[0].build())


def test_resume_tells_domains_and_layers_apart(net: nn.Module, data: ImageData, tmp_path: Path) -> None:
    few = data.first(4)
    certifier = Certifier(net, (1, 28, 28), ("IBP",), batch_size=2)
    certify_dataset(certifier, few, [set_spec("l2=0.1")], tmp_path / "r.jsonl")
    spec = set_spec({"norm": 2, "eps": "0.1", "domain": None})
    with pytest.raises(DataError, match="other settings"):
        certify_dataset(certifier, few, [spec], tmp_path / "r.jsonl")
    layers = list(net.children())
    other = nn.Sequential(*layers[:-2], nn.Identity(), layers[-1])
    again = Certifier(other, (1, 28, 28), ("IBP",), batch_size=2)
    with pytest.raises(DataError, match="other settings"):
        certify_dataset(again, few, [set_spec("l2=0.1")], tmp_path / "r.jsonl")


def test_labels_must_be_classes(certifier: Certifier) -> None:
    with pytest.raises(SpecError, match=r"labels lie in 10 \.\. 10, but the net has 10 classes"):
        certifier.decide(torch.zeros(1, 1, 28, 28), torch.tensor([10]), SPECS[0].build())


def test_kinds_of_sets_are_counted_apart(certifier: Certifier, data: ImageData) -> None:
    sets = [set_spec(text) for text in ("linf=0.02", "l2=0.1", "l2=0.2", "R(1)", "C(5)", "patch=1x1")]
    records = certify_dataset(certifier, data.first(6), sets)
    assert list(records[0].sets) == ["linf", "l2=0.1", "l2=0.2", "R(1)", "C(5)", "patch1x1"]
    for record in records:
        status = {name: verdict.status for name, verdict in record.sets.items()}
        assert record.union == union_status([status["linf"], status["l2=0.1"], status["l2=0.2"]])
        assert record.groups == {
            "geometric": union_status([status["R(1)"], status["C(5)"]]),
            "patch": status["patch1x1"],
            "universal": union_status(list(status.values())),
        }
    summary = summarize(records)
    assert summary.groups["universal"] <= min(summary.union, *summary.groups.values())
    assert "universal cert. / attack leaves" in text_table({"net": summary})
    alone = certify_dataset(certifier, data.first(2), sets[:1])
    assert alone[0].groups == {} and summarize(alone).groups == {}


def test_stages_fit_the_set(net: nn.Module) -> None:
    def stages_of(text: str, certifier: Certifier) -> list[str]:
        return [method.name for method in applicable(certifier.methods, set_spec(text).build())]

    certifier = Certifier(net, (1, 28, 28))
    stages = {text: stages_of(text, certifier) for text in ("linf=0.1", "l2=0.5", "R(5)", "patch=2x2")}
    assert stages["linf=0.1"] == ["IBP", "pgd", "CROWN-IBP", "CROWN", "branch-and-bound"]
    assert stages["l2=0.5"] == ["IBP", "pgd", "lipschitz", "CROWN-IBP", "CROWN", "coupled", "branch-and-bound"]
    assert stages["R(5)"] == stages["patch=2x2"] == ["IBP", "pgd", "CROWN-IBP", "CROWN", "splitting"]
    assert stages_of("R(5)", Certifier(net, (1, 28, 28), ("CROWN",))) == ["pgd", "CROWN"]


@pytest.mark.parametrize("text", ["R(6)", "patch=2x2"])
def test_splitting_decides_what_one_bound_cannot(net: nn.Module, data: ImageData, text: str) -> None:
    x, y = data.batch(slice(0, 4))
    perturbation = set_spec(text).build()
    whole = Certifier(net, (1, 28, 28), ("IBP", "CROWN")).decide(x, y, perturbation)[0]
    split = Certifier(net, (1, 28, 28), ("IBP", "CROWN", "splitting"), pieces=200).decide(x, y, perturbation)[0]
    for one, other in zip(whole, split, strict=True):
        assert other.status == "proved" or one.status != "proved"
        assert other.pieces <= 200 and (other.pieces > 0) == (other.stage == "splitting")
    assert sum(v.status == "proved" for v in split) > sum(v.status == "proved" for v in whole)


def test_coupled_never_falls_below_crown_and_leaves_gradients_on(net: nn.Module, data: ImageData) -> None:
    x, y = data.batch(slice(0, 3))
    certifier = Certifier(net, (1, 28, 28))
    certifier._bounder.coupled = CoupledBounds(certifier._bounder.bounded, 5, 5, 1)
    wanted = [parameter.requires_grad for parameter in net.parameters()]
    for text in ("l2=0.5", "l1=1"):
        perturbation = set_spec(text).build()
        crown = certifier.lower_bound(x, y, perturbation, "CROWN")
        coupled = certifier.lower_bound(x, y, perturbation, "coupled")
        assert bool((coupled >= crown - 1e-5).all())
        point = pgd(net, x, y, perturbation, Pgd(50, worst_margin_loss))
        assert bool((-worst_margin_loss(net(point), y) >= coupled - 1e-5).all())
    assert wanted == [parameter.requires_grad for parameter in net.parameters()]


def test_radii_per_sample_follow_their_images(certifier: Certifier, data: ImageData) -> None:
    x, y = data.batch(slice(0, 25))
    y = y.clone()
    y[0] = (y[0] + 1) % 10  # a misclassified image: the later stages see the others only
    eps = torch.linspace(0, 0.6, 25)
    together = certifier.decide(x, y, PerturbationLpBall(2, eps))[0]
    for i in (0, 3, 12, 24):
        alone = certifier.decide(x[i : i + 1], y[i : i + 1], PerturbationLpBall(2, float(eps[i])))[0][0]
        assert alone.status == together[i].status or "falsified" in (alone.status, together[i].status)
    bounds = certifier.lower_bound(x, y, PerturbationLpBall(2, eps), "CROWN")
    last = certifier.lower_bound(x[24:], y[24:], PerturbationLpBall(2, float(eps[24])), "CROWN")
    assert float(bounds[24]) == pytest.approx(float(last), abs=1e-4)


class TestIbp(MethodTestCase):
    def make(self) -> Method:
        return METHODS.make("IBP")


class TestCoupled(MethodTestCase):
    def make(self) -> Method:
        return METHODS.make("coupled")


class TestAlphaCrown(MethodTestCase):
    def make(self) -> Method:
        return METHODS.make("alpha-CROWN", {"iterations": 3})


class TestSplitting(MethodTestCase):
    def make(self) -> Method:
        return METHODS.make("splitting", {"pieces": 20})


class TestAttack(MethodTestCase):
    def make(self) -> Method:
        return METHODS.make("pgd", {"steps": 5, "restarts": 1})
