"""The ready-made loop: learns, resumes bit for bit, projects gradients as defined, refuses foreign folders."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cure_plugin.checkpoint import load_checkpoint, load_net, save_checkpoint
from cure_plugin.datasets import ImageData, load_data
from cure_plugin.errors import CheckpointError, OutputError, SpecError
from cure_plugin.nets import NetSpec, build_net
from cure_plugin.training import Recipe, Sabr, SetRecipe, Trainer, load_recipe
from cure_plugin.training.loss import LipschitzMargin, SabrBox
from cure_plugin.training.objective import CureObjective, Outcome
from cure_plugin.training.recipe import recipe_from_mapping, shipped_recipes

RECIPE = Recipe(
    data="mnist-slice",
    net="cnn_small",
    sets=(SetRecipe("linf=0.05", Sabr(0.4)), SetRecipe("l2=0.2", Sabr(1.0))),
    epochs=3,
    ramp_epochs=1,
    batch_size=50,
    alignment=0.5,
    gradient_projection=0.5,
    attack_steps=2,
    l1_penalty=1e-5,
    milestones=(2,),
)

UNION = replace(
    RECIPE,
    sets=(SetRecipe("linf=0.05", Sabr(0.4), every=2), SetRecipe("l2=0.2", LipschitzMargin())),
    alignment=0.0,
    gradient_projection=0.0,
    natural=0.1,
    cooldown_epochs=2,
)
"""What keeps more from step to step: vectors of power iteration, whose turn it is, the rate."""


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("mnist-slice", True).first(150)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


@pytest.mark.parametrize("recipe", [RECIPE, UNION], ids=["cure", "union"])
def test_an_interrupted_run_ends_in_the_same_weights(recipe: Recipe, data: ImageData, tmp_path: Path) -> None:
    whole = Trainer(recipe, data, tmp_path / "whole")
    whole.run()

    class Killed(Exception):
        pass

    for kill_at in (1, 5, 8):
        part = Trainer(recipe, data, tmp_path / "part")
        calls = 0

        def killing(_: object, arguments: tuple[object, ...], kill_at: int = kill_at) -> None:
            nonlocal calls
            calls += len(arguments) > 2  # a certified step
            if calls == kill_at:
                raise Killed

        part._losses.register_forward_pre_hook(killing)
        try:
            part.run()
        except Killed:
            continue
    resumed = Trainer(recipe, data, tmp_path / "part")
    resumed.run()
    assert torch.equal(weights(whole), weights(resumed))
    assert [h["loss"] for h in whole.history] == [h["loss"] for h in resumed.history]


def test_a_finished_run_is_reused(data: ImageData, tmp_path: Path) -> None:
    first = Trainer(RECIPE, data, tmp_path)
    first.run()
    again = Trainer(RECIPE, data, tmp_path)
    assert again.epochs_done == RECIPE.epochs
    assert torch.equal(weights(first), weights(again))
    spec, net = load_net(tmp_path / "checkpoint.pt")
    assert spec.name == "cnn_small" and not net.training


def test_projection_uses_both_epochs_from_the_same_start(data: ImageData) -> None:
    """One epoch after annealing, redone by hand: certified and natural passes from equal weights, then mixed."""
    recipe = replace(RECIPE, natural_epochs=0, ramp_epochs=0, epochs=1)
    trainer = Trainer(recipe, data)
    trainer.run()
    certified = Trainer(replace(recipe, gradient_projection=0.0), data)
    certified.run()
    natural = Trainer(replace(recipe, gradient_projection=0.0, natural_epochs=1), data)
    natural.run()
    start = Trainer(recipe, data)
    for name, theta in start.net.named_parameters():
        g_c = certified.net.get_parameter(name) - theta
        g_n = natural.net.get_parameter(name) - theta
        cosine = torch.nn.functional.cosine_similarity(g_c.flatten(), g_n.flatten(), dim=0)
        expected = theta + 0.5 * g_c + 0.5 * max(float(cosine), 0.0) * g_n
        assert torch.allclose(trainer.net.get_parameter(name), expected, atol=1e-6)


def test_training_lowers_the_loss() -> None:
    recipe = replace(
        RECIPE, epochs=4, learning_rate=2e-3, sets=(SetRecipe("linf=0.02", Sabr(0.4)),), alignment=0.0, milestones=()
    )
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(1000))
    trainer.run()
    assert trainer.history[-1]["loss"] < 0.7 * trainer.history[0]["loss"]


def test_batch_norm_nets_train(data: ImageData) -> None:
    trainer = Trainer(replace(RECIPE, batch_norm=True, epochs=2, ramp_epochs=0), data)
    net = trainer.run()
    running = net[1].running_mean  # type: ignore[index]
    assert bool(running.isfinite().all()) and float(running.abs().sum()) > 0  # type: ignore[operator,union-attr]


def test_another_recipe_in_the_folder_is_refused(data: ImageData, tmp_path: Path) -> None:
    Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data, tmp_path).run()
    with pytest.raises(CheckpointError, match="another recipe"):
        Trainer(RECIPE, data, tmp_path)


def test_a_flipped_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    spec = NetSpec("cnn_tiny", (1, 28, 28))
    net = build_net(spec)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, spec, net)
    content = bytearray(path.read_bytes())
    weights = net[0].weight.detach().numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"part .*data/\d+ is damaged"):
        load_net(path)


def test_a_truncated_checkpoint_is_named(data: ImageData, tmp_path: Path) -> None:
    Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data, tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*checkpoint\.pt"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_an_unwritable_folder_is_named_and_nothing_is_left(data: ImageData, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OutputError, match="cannot create folder"):
        Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data, blocker / "run")
    trainer = Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data, tmp_path / "run")
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("")  # the folder goes away while the first epoch runs
    with pytest.raises(OutputError, match="cannot write"):
        trainer.run()
    (tmp_path / "run").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_recipes_round_trip_and_ship() -> None:
    assert recipe_from_mapping(RECIPE.to_mapping()) == RECIPE
    for name in shipped_recipes():
        load_recipe(name)
    assert load_recipe("demo_cure", {"epochs": "20", "batch_norm": "true"}).epochs == 20
    fractions = load_recipe("demo_cure", {"learning_rate": "1/500", "mean": "[51/255]", "std": ["1/4"]})
    assert (fractions.learning_rate, fractions.mean, fractions.std) == (0.002, (0.2,), (0.25,))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"epochs": "many"}, "'epochs' has the unusable value"),
        ({"epochs": 1.5}, "whole number"),
        ({"milestones": [1.5]}, "whole number"),
        ({"epochs": 0}, "epochs must be at least 1 and whole"),
        ({"net": "cnn8"}, "unknown net 'cnn8'"),
        ({"data": "mnits"}, "unknown data set"),
        ({"sets": [{"ratio": 1.0}]}, "'sets' has the unusable value"),
        ({"gradient_projection": 2}, r"must lie in \[0, 1\]"),
        ({"ramp_epochs": 50}, "annealing ends after epoch 51, but there are 3 epochs"),
        ({"natural_epochs": 9}, "annealing ends after epoch 10"),
        ({"seed": 10**15}, "seed must be below"),
        ({"alignment": math.nan}, "alignment must be finite"),
        ({"learning_rate": math.inf}, "learning_rate must lie in"),
        ({"milestones": [-1]}, "milestones must be at least 0 and whole"),
        ({"pad": 2}, "pad needs crop"),
        ({"sets": "linf=0.1"}, "a list of sets expected"),
        ({"ramp_epochs": 2, "gradient_projection": 0.2}, "would never apply"),
        ({"batch_norm": True, "batch_size": 1}, "batch_size must be at least 2 with"),
        ({"batch_size": "yes"}, "a number expected"),
        ({"milestones": 5}, "a list expected"),
        ({"sets": [3]}, "a mapping of keys to values expected, got 3"),
        ({"learning_rate": "1/0"}, "a number like 0.1 or 8/255"),
        ({"regularizer": math.nan}, "regularizer must be"),
        ({"strategy": "joint", "weights": [math.nan, 1.0]}, "weights must be"),
        ({"strategy": "joint", "weights": [0, 0]}, "not all 0"),
        ({"sets": [{"set": "linf=0.1", "attack_step": math.inf}]}, "attack_step of linf must be finite"),
        ({"sets": [{"set": "linf=1e9999999999"}]}, "must be finite"),
        ({"clip": -1.0}, "clip must be finite and >= 0"),
        ({"mean": [0.5], "std": []}, "mean and std need one number per channel"),
        ({"mean": [0.5], "std": [0]}, "std > 0; got"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        recipe_from_mapping({**RECIPE.to_mapping(), **changes})


def test_missing_recipe_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="unknown recipe 'nope'; known: cifar_large/finetune"):
        load_recipe("nope")
    with pytest.raises(SpecError, match="did you mean 'mnist_small/scratch'"):
        load_recipe("mnist_small/scratsch")
    with pytest.raises(SpecError, match="cannot read recipe"):
        load_recipe(str(tmp_path / "x.yaml"))
    (tmp_path / "y.yaml").write_text("a: [")
    with pytest.raises(SpecError, match="is no YAML"):
        load_recipe(str(tmp_path / "y.yaml"))


def test_a_file_of_several_methods(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "{data: mnist-slice, net: cnn_small, epochs: 3, ramp_epochs: 1, sets: [{set: l2=0.5}],"
        " methods: {a: {strategy: max}, b: {epochs: 4}}}"
    )
    assert load_recipe(f"{path}/b").epochs == 4 and load_recipe(f"{path}/a").epochs == 3
    assert load_recipe(f"{path}/a", {"epochs": "5"}).epochs == 5
    for name in (f"{path}", f"{path}/c"):
        with pytest.raises(SpecError, match="names none of the methods in the file: a, b"):
            load_recipe(name)
    plain = tmp_path / "plain.yml"
    plain.write_text("{data: mnist-slice, net: cnn_small, epochs: 3, ramp_epochs: 1, sets: [{set: l2=1}], start: null}")
    assert load_recipe(str(plain)).start == ""
    with pytest.raises(SpecError, match="none of the methods in the file: it has none"):
        load_recipe(f"{plain}/typo")
    for methods in ("5", "{1: 2}", "{a: }"):
        path.write_text(f"{{data: mnist-slice, methods: {methods}}}")
        with pytest.raises(SpecError, match="must map names to mappings of keys"):
            load_recipe(f"{path}/a")


def test_boxes_and_crops_that_do_not_fit_are_refused_before_training(data: ImageData) -> None:
    box = (SetRecipe("l2=0.5", SabrBox(0.4)),)
    with pytest.raises(SpecError, match="does not fit into it; take a ratio"):
        Trainer(replace(RECIPE, sets=box, alignment=0.0), data)
    with pytest.raises(SpecError, match="crop 36 is larger than the images of mnist-slice, 28 x 28"):
        Trainer(replace(RECIPE, crop=36, pad=4), data)
    with pytest.raises(SpecError, match=r"one number per channel \(1\), got \[0.5, 0.4\]"):
        Trainer(replace(RECIPE, mean=(0.5, 0.4), std=(0.2, 0.2)), data)
    with pytest.raises(SpecError, match="needs larger images"):
        Trainer(replace(RECIPE, crop=1), data)
    with pytest.raises(SpecError, match="patch"):
        Trainer(replace(RECIPE, sets=(SetRecipe("patch=40x40", Sabr(0.5)),), alignment=0.0), data)
    with pytest.raises(SpecError, match="at least 2 images are needed"):
        Trainer(replace(RECIPE, batch_norm=True), data.first(1))
    with pytest.raises(OutputError, match="File name too long"):
        Trainer(RECIPE, data, Path("x" * 300))
    with pytest.raises(OutputError, match="File name too long"):
        Trainer(replace(RECIPE, start="x" * 300), data)


def test_a_loss_that_blows_up_is_said_and_not_kept(data: ImageData, tmp_path: Path) -> None:
    trainer = Trainer(replace(RECIPE, learning_rate=1000.0), data, tmp_path)
    with torch.no_grad():
        for parameter in trainer.net.parameters():
            parameter.mul_(1e30)
    with pytest.raises(SpecError, match=r"loss became \w+ in epoch"):
        trainer.run()
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("key, value", [("certified_optimizer", None), ("epochs_done", None), ("moments", None)])
def test_a_state_that_cannot_be_resumed_is_named(key: str, value: object, data: ImageData, tmp_path: Path) -> None:
    Trainer(replace(RECIPE, epochs=3), data, tmp_path).run()
    path = tmp_path / "checkpoint.pt"
    payload = load_checkpoint(path)
    if key == "moments":
        payload["certified_optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    else:
        payload[key] = value
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match="lacks the state to resume from"):
        Trainer(RECIPE, data, tmp_path)


def test_bad_keys_of_a_set_are_named() -> None:
    with pytest.raises(SpecError, match="unknown key of a set 'ration'; did you mean 'ratio'"):
        recipe_from_mapping({**RECIPE.to_mapping(), "sets": [{"set": "l2=0.5", "ration": 0.4}]})


@pytest.mark.parametrize("strategy", ["random", "max"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_last_batch_of_one_is_survived(strategy: str, batch_norm: bool) -> None:
    sets = (SetRecipe("linf=0.05", Sabr(0.4)), SetRecipe("l2=0.2"), SetRecipe("l1=0.5"))
    recipe = replace(
        RECIPE,
        sets=sets,
        strategy=strategy,
        batch_norm=batch_norm,
        alignment=0.0,
        epochs=2,
        ramp_epochs=0,
        batch_size=20,
    )
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(41))
    trainer.run()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.history)


def test_certified_epochs_move_the_running_statistics(data: ImageData) -> None:
    trainer = Trainer(replace(RECIPE, batch_norm=True, natural_epochs=0, gradient_projection=0.0, epochs=1), data)
    before = trainer.net[1].running_mean.clone()  # type: ignore[union-attr,operator]
    trainer.run()
    assert not torch.equal(before, trainer.net[1].running_mean)  # type: ignore[arg-type]


def test_finetuning_goes_on_from_a_checkpoint_or_a_state_dict(data: ImageData, tmp_path: Path) -> None:
    first = Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data, tmp_path / "first")
    first.run()
    torch.save(first.net.state_dict(), tmp_path / "plain.pt")
    results = []
    for start in (tmp_path / "first" / "checkpoint.pt", tmp_path / "plain.pt"):
        recipe = replace(RECIPE, start=str(start), natural_epochs=0, ramp_epochs=1, epochs=2)
        trainer = Trainer(recipe, data, tmp_path / start.stem)
        assert torch.equal(weights(trainer), weights(first))
        trainer.run()
        results.append(weights(trainer))
        again = Trainer(recipe, data, tmp_path / start.stem)  # resumed from its own weights, not from the start's
        assert torch.equal(weights(again), results[-1]) and not torch.equal(results[-1], weights(first))
    assert torch.equal(*results)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other net", "no model"])
def test_a_start_that_does_not_fit_is_named(damage: str, data: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "start.pt"
    message = "is no file; this recipe goes on from a trained net"
    if damage == "truncated":
        path.write_bytes(b"PK")
        message = "cannot read checkpoint"
    elif damage == "no model":
        torch.save({"format": 1}, path)
        message = "does not fit net 'cnn_small'"
    elif damage == "other net":
        torch.save({"0.weight": torch.zeros(3)}, path)
        message = "does not fit net 'cnn_small'"
    with pytest.raises(CheckpointError, match=message):
        Trainer(replace(RECIPE, start=str(path)), data)


@pytest.mark.parametrize("early", [False, True])
def test_projection_starts_after_annealing_or_with_it(early: bool, data: ImageData) -> None:
    recipe = replace(RECIPE, epochs=4, ramp_epochs=1.5, project_while_annealing=early)
    trainer = Trainer(recipe, data)
    trainer.run()
    projected = ["natural_loss" in entry for entry in trainer.history]
    assert projected == ([False, True, True, True] if early else [False, False, False, True])


def test_projection_works_for_a_single_set(data: ImageData) -> None:
    single = replace(RECIPE, sets=(SetRecipe("linf=0.05", Sabr(0.4)),), strategy="single", alignment=0.0)
    trainer = Trainer(single, data)
    trainer.run()
    assert "natural_loss" in trainer.history[-1]


def test_nets_take_crops(data: ImageData, tmp_path: Path) -> None:
    recipe = replace(RECIPE, flip=True, crop=24, epochs=2, ramp_epochs=0, batch_size=75)
    trainer = Trainer(recipe, data, tmp_path, test=data.first(20))
    trainer.run()
    assert load_net(tmp_path / "checkpoint.pt")[0].input_shape == (1, 24, 24)
    assert 0 <= trainer.history[-1]["test.clean"] <= 1
    again = Trainer(recipe, data)
    again.run()
    assert torch.equal(weights(trainer), weights(again))


def test_checkpoints_of_before_a_recipe_key_existed_are_resumed(data: ImageData, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, data, tmp_path)
    trainer.run()
    payload = load_checkpoint(tmp_path / "checkpoint.pt")
    del payload["recipe"]["relu_shrink"], payload["recipe"]["start"]
    torch.save(payload, tmp_path / "checkpoint.pt")
    assert Trainer(RECIPE, data, tmp_path).epochs_done == RECIPE.epochs
    with pytest.raises(CheckpointError, match="another recipe"):
        Trainer(replace(RECIPE, relu_shrink=0.8), data, tmp_path)


def test_a_universal_recipe_trains_on_the_slice() -> None:
    sets = (
        SetRecipe("linf=0.05", Sabr(0.4)),
        SetRecipe("l2=0.2"),
        SetRecipe("R(10)", Sabr(0.1)),
        SetRecipe("patch=2x2", Sabr(0.2)),
    )
    recipe = replace(RECIPE, sets=sets, align_from="weaker", epochs=2, ramp_epochs=1, natural_epochs=0)
    trainer = Trainer(recipe, load_data("mnist-slice", True).first(60), test=load_data("mnist-slice", False).first(10))
    trainer.run()
    logged = trainer.history[-1]
    assert {"loss.linf", "loss.l2", "loss.R(10)", "loss.patch2x2", "test.ibp.R(10)", "test.pgd.patch2x2"} <= set(logged)
    assert all(math.isfinite(value) for value in logged.values())


_RUN = """
import sys
from pathlib import Path
from cure_plugin.datasets import load_data
from cure_plugin.training import Trainer
from cure_plugin.training.recipe import recipe_from_mapping
import json
recipe = recipe_from_mapping(json.loads(sys.argv[1]))
Trainer(recipe, load_data("mnist-slice", True).first(400), Path(sys.argv[2])).run()
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL at random moments, writing checkpoints included; each new process goes on where the last one was."""
    recipe = replace(RECIPE, epochs=6, ramp_epochs=2, batch_norm=True)
    arguments = [sys.executable, "-c", _RUN, json.dumps(recipe.to_mapping())]
    subprocess.run([*arguments, str(tmp_path / "whole")], check=True)
    epoch_seconds = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")["history"][-1]["seconds"]
    path = tmp_path / "killed" / "checkpoint.pt"
    chance = random.Random(0)
    kills = 0
    while True:
        written = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen([*arguments, str(path.parent)])
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == written):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 1.5) * epoch_seconds)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 3
    whole, killed = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed["model"][name]) for name, value in whole["model"].items())
    timeless = [[{**entry, "seconds": 0} for entry in payload["history"]] for payload in (whole, killed)]
    assert timeless[0] == timeless[1]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint.pt", "training.jsonl"]


def test_other_images_in_the_folder_are_refused(data: ImageData, tmp_path: Path) -> None:
    Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data, tmp_path).run()
    with pytest.raises(CheckpointError, match="was trained on other images"):
        Trainer(replace(RECIPE, epochs=2, ramp_epochs=0), data.first(100), tmp_path)


def test_rates_fall_to_0_over_the_last_epochs(data: ImageData) -> None:
    trainer = Trainer(replace(RECIPE, epochs=4, milestones=(), cooldown_epochs=2.0), data)
    rates = [trainer._rate(elapsed) / RECIPE.learning_rate for elapsed in (0, 2, 3, 3.5, 4)]
    assert rates == pytest.approx([1, 1, 0.5, 0.25, 0])


def test_a_set_is_looked_at_in_its_turn_and_natural_losses_have_their_share(data: ImageData) -> None:
    trainer = Trainer(UNION, data)
    x, y = data.batch(slice(0, 8))
    seldom, always = trainer.objective.names

    def outcome(step: int, objective: CureObjective) -> Outcome:
        return objective(trainer.bounded, trainer.net, x, y, generator=torch.Generator().manual_seed(0), step=step)

    both, one = (outcome(step, trainer.objective) for step in (0, 1))
    assert {f"loss.{seldom}", f"loss.{always}"} <= set(both.figures) and f"loss.{seldom}" not in one.figures
    alone = outcome(1, replace(trainer.objective, natural=0.0))
    natural = torch.nn.functional.cross_entropy(trainer.net(x), y)
    assert float(one.loss) == pytest.approx(0.9 * float(alone.loss) + 0.1 * float(natural), rel=1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sets": tuple(replace(entry, every=2) for entry in UNION.sets)}, "one set must be there at each"),
        ({"alignment": 0.5}, "need all sets at each"),
        ({"strategy": "random"}, "need all sets at each"),
        ({"natural": 1.0}, "natural must be below 1"),
        ({"sets": (SetRecipe("patch=2x2", LipschitzMargin()),)}, "loss lipschitz takes lp balls"),
    ],
)
def test_unions_that_cannot_be_trained_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(UNION, **changes)


@pytest.mark.parametrize(
    "recipe_name", [pytest.param("tinyimagenet/scratch", marks=pytest.mark.slow), "small_tinyimagenet/union"]
)
def test_tinyimagenet_trains_step_by_step(recipe_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full recipe on four images, a step an epoch: stopped after one, the same as without a stop."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    images = ImageData(pixels, torch.tensor([3, 150]), 200)
    shorter = {"batch_size": 2, "epochs": 2, "natural_epochs": 0, "ramp_epochs": 1, "milestones": [], "attack_steps": 1}
    recipe = load_recipe(recipe_name, {**shorter, "cooldown_epochs": 0})
    whole = Trainer(recipe, images)
    whole.run()
    stopped = Trainer(recipe, images, tmp_path)
    keep = stopped._save
    monkeypatch.setattr(stopped, "_save", lambda: (keep(), (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = Trainer(recipe, images, tmp_path)
    assert resumed.epochs_done == 1
    resumed.run()
    assert torch.equal(weights(whole), weights(resumed))
