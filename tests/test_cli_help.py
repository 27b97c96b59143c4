"""The help of every command, as a new user meets it: an example that parses, defaults, exit codes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cure_plugin.cli import doctor, main
from cure_plugin.cli.main import _parser

Installed = Callable[..., None]

COMMANDS = (
    "train",
    "certify",
    "merge",
    "compare",
    "export",
    "verify",
    "check",
    "bench",
    "bench check",
    "bench pack",
    "report",
    "sets",
    "zoo",
    "doctor",
    "demo",
)


def shown(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^example: cure (.*)$", shown(command, capsys), re.MULTILINE)
    assert example.startswith(command)
    options = _parser().parse_args(shlex.split(example))
    assert callable(options.run)


def test_defaults_and_units_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown("export", capsys).split())
    assert "seconds per instance (default: 300)" in text and "from the first (default: 10)" in text
    assert "None" not in text and "False" not in text
    assert "default: mnist-slice" in " ".join(shown("certify", capsys).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage, what, *_ = shown(command, capsys).split("\n\n")
    assert usage.startswith("usage: ") and re.match(r"[A-Z].+\.$", what)


def test_recipes_and_their_keys_are_listed_unbroken(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("train", capsys)
    assert "\nsmall_mnist_small/{ba_only, " in text and " attack_steps=8," in text and " milestones," in text


@pytest.mark.parametrize(
    "group, arguments",
    [
        ("sets", ["sets"]),
        ("losses", ["train", "demo_linf", "sets=[{set: linf=1, loss: own}]", "--out", "OUT"]),
        ("methods", ["--help"]),
        ("encodings", ["--help"]),
        ("verifiers", ["--help"]),
    ],
)
def test_a_package_that_cannot_be_imported_is_named_on_one_line(
    group: str, arguments: list[str], installed: Installed, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    installed(**{group: ("own", "not_installed_anywhere")})
    assert main([str(tmp_path) if text == "OUT" else text for text in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"'not_installed_anywhere' in the entry-point group cure_plugin.{group}" in line and "No module named" in line
    )


def test_all_commands_and_exit_codes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("", capsys)
    assert all(re.search(rf"^    {command.split()[0]} ", text, re.MULTILINE) for command in COMMANDS)
    assert all(f"{code}:" in " ".join(text.split()) for code in (2, 3, 130))


@pytest.mark.parametrize(
    "arguments", [[], ["nope"], ["certify"], ["certify", "a.pt", "linf=1", "--out", "o", "--nope"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"cure_plugin \S+, auto_LiRPA \S+, torch \S+\n", capsys.readouterr().out)


def test_the_doctor_says_what_is_there_and_what_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    monkeypatch.setenv("CURE_DATA", str(tmp_path))
    monkeypatch.setitem(doctor._OPTIONAL, "no-such-package", "nothing")
    assert main(["doctor"]) == 0
    lines = dict(re.findall(r"^(\S+(?: \S+)?) {2,}(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert lines["hooks"] == "in place" and lines["data mnist"] == "there" and "cifar-10" in lines["data cifar10"]
    assert lines["no-such-package"] == "missing; for nothing" and lines["CURE_DATA"] == str(tmp_path)
