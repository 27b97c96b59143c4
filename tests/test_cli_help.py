"""The help of every command, as a new user meets it: an example that parses, defaults, exit codes."""

from __future__ import annotations

import re
import shlex

import pytest

from cure_plugin.cli import main
from cure_plugin.cli.main import _parser

COMMANDS = (
    "train",
    "certify",
    "compare",
    "export",
    "verify",
    "check",
    "bench check",
    "bench pack",
    "report",
    "sets",
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
