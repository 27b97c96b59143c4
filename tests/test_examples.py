"""The examples run and do what they promise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cure_plugin import PerturbationSet
from cure_plugin.certification import METHODS, Method
from cure_plugin.cli import main
from cure_plugin.datasets import load_data
from cure_plugin.export import read_query
from cure_plugin.sets import kinds, set_spec
from cure_plugin.testing import LossTestCase, MethodTestCase, PerturbationTestCase, VerifierTestCase
from cure_plugin.training import LOSSES, Loss
from cure_plugin.vnncomp.verifiers import VERIFIERS, Verifier

Installed = Callable[..., None]

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simple_verification_tightens_from_ibp_to_crown() -> None:
    bounds = load("simple_verification").main()
    widths = [float((upper - lower).mean()) for lower, upper in bounds.values()]
    assert widths[0] > widths[1] > widths[2] > 0


def test_simple_verification_differs_from_a_stock_script_in_the_perturbation_only() -> None:
    lines = (EXAMPLES / "simple_verification.py").read_text().splitlines()
    code = [line for line in lines if "cure_plugin" in line and line.strip().startswith(("from", "ptb"))]
    assert len(code) == 2


def test_own_training_loop_learns() -> None:
    losses = load("own_training_loop").main()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_set_of_your_own_registers_trains_and_certifies() -> None:
    from cure_plugin.certification import Certifier
    from cure_plugin.datasets import load_data
    from cure_plugin.training import Trainer, load_recipe

    load("stripes")
    assert "stripe" in kinds()
    data = load_data("mnist-slice", True).first(1500)
    overrides = {
        "sets": [{"set": "stripe=1", "ratio": 0.5}],
        "epochs": 4,
        "ramp_epochs": 1,
        "attack_steps": 2,
        "batch_size": 50,
        "regularizer": 0,
        "milestones": [],
    }
    trainer = Trainer(load_recipe("demo_linf", overrides), data)
    net = trainer.run()
    test = load_data("mnist-slice", False).first(20)
    x, y = test.batch(slice(0, 20))
    verdicts, _ = Certifier(net, test.shape, ("IBP", "CROWN-IBP", "CROWN")).decide(x, y, set_spec("stripe=1").build())
    assert any(verdict.status == "proved" for verdict in verdicts)


class TestStripe(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return load("stripes").PerturbationStripe(2)

    def test_pickles(self) -> None:
        """An example loaded by path is no importable module; packages are."""


class TestDimming(PerturbationTestCase):
    def make(self) -> PerturbationSet:
        return load("dimming").PerturbationDimming(0.3)

    def test_pickles(self) -> None:
        """See :class:`TestStripe`."""


class TestLogitPairing(LossTestCase):
    def make(self) -> Loss:
        return load("logit_pairing").LogitPairing(0.25)


def test_a_loss_of_your_own_trains_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: Installed
) -> None:
    """Found by its entry point, as an installed package's; a wrong option is refused."""
    module = EXAMPLES / "logit_pairing.py"
    (tmp_path / "pairing.py").write_text(module.read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(losses=("pairing", "pairing"))
    monkeypatch.setattr("cure_plugin.cli.train.load_data", lambda name, train, root: load_data(name, train).first(20))
    monkeypatch.setattr(LOSSES, "_classes", {k: v for k, v in LOSSES._classes.items() if k != "logit-pairing"})
    quick = ["epochs=2", "ramp_epochs=0", "batch_size=10", "attack_steps=1", "milestones=[]", "net=cnn_tiny"]
    sets = "sets=[{set: linf=0.02, loss: logit-pairing, WEIGHT: 0.25}]"
    for weight, code in (("weight", 0), ("wait", 2)):
        told = ["train", "demo_linf", *quick, sets.replace("WEIGHT", weight), "--out", str(tmp_path / weight)]
        assert main(told) == code
    assert "unknown key of a set 'wait'; did you mean 'weight'?" in capsys.readouterr().err


class TestClassByClass(MethodTestCase):
    def make(self) -> Method:
        return load("class_by_class").ClassByClass()


def test_a_method_of_your_own_certifies_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: Installed
) -> None:
    """Found by its entry point, as an installed package's; the nearest name is offered for a wrong one."""
    (tmp_path / "classes.py").write_text((EXAMPLES / "class_by_class.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(methods=("class-by-class", "classes"))
    monkeypatch.setattr(METHODS, "_classes", {k: v for k, v in METHODS._classes.items() if k != "class-by-class"})
    net = Path(__file__).parent.parent / "benchmarks" / "fixtures" / "ball.pt"
    told = ["certify", str(net), "linf=0.01", "--on", "mnist-slice", "--images", "3"]
    assert main([*told, "--methods", "class-by-class", "--out", str(tmp_path / "out")]) == 0
    assert '"stage": "class-by-class"' in (tmp_path / "out" / "results.jsonl").read_text()
    assert main([*told, "--methods", "class-by-clas", "--out", str(tmp_path / "none")]) == 2
    assert "unknown method 'class-by-clas'; did you mean 'class-by-class'?" in capsys.readouterr().err


class TestSampling(VerifierTestCase):
    @pytest.fixture(autouse=True)
    def found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))

    def make(self) -> Verifier:
        return load("sampling").Sampling()


def test_a_verifier_of_your_own_is_asked_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: Installed
) -> None:
    """Found by its entry point, as an installed package's; the nearest name is offered for a wrong one."""
    (tmp_path / "points.py").write_text((EXAMPLES / "sampling.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    installed(verifiers=("sampling", "points"))
    monkeypatch.setattr(VERIFIERS, "_classes", {k: v for k, v in VERIFIERS._classes.items() if k != "sampling"})
    net, files = Path(__file__).parent.parent / "benchmarks" / "fixtures" / "ball.pt", tmp_path / "files"
    assert main(["export", str(net), "linf=0.5", "--images", "1", "--out", str(files)]) == 0
    told = ["verify", str(files / "instances.csv"), "--out", str(tmp_path / "out"), "--verifier"]
    assert main([*told, "sampling"]) == 0
    assert "1 sat" in capsys.readouterr().out
    assert main([*told, "samplin"]) == 2
    assert "unknown verifier 'samplin'; did you mean 'sampling'?" in capsys.readouterr().err


def test_sets_in_the_group_of_before_are_found_with_a_warning(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    installed(perturbations=("stripe", "stripes"))
    with pytest.warns(DeprecationWarning, match=r"cure_plugin\.sets"):
        assert "stripe" in kinds()


def test_an_encoding_of_your_own_is_exported_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Installed
) -> None:
    """With the set it is for, both found by their entry points; what it allows is what the set holds."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    installed(sets=("stripe", "stripes"), encodings=("rows", "stripe_rows"))
    net = Path(__file__).parent.parent / "benchmarks" / "fixtures" / "ball.pt"
    told = ["export", str(net), "stripe=1", "--on", "mnist-slice", "--images", "1"]
    assert main([*told, "--out", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").rglob("*.vnnlib*")
    query = read_query(written)
    x, _ = load_data("mnist-slice", False).batch(slice(0, 1))
    stripe = set_spec("stripe=1").build()
    assert len(query.cases()) == 28
    for seed in range(20):
        point = stripe.sample(x, torch.Generator().manual_seed(seed)).flatten().double().numpy()
        assert any(bool(((case.lower <= point) & (point <= case.upper)).all()) for case in query.cases())


def test_your_own_net_is_certified_for_several_sets() -> None:
    summary = load("certify_own_net").main()
    assert set(summary.certified) == {"linf", "l2", "l1", "R(2)", "patch1x1"}
    assert all(0 < share <= summary.clean for share in summary.certified.values()) and "universal" in summary.groups
