"""The README of the app: its Python example runs, and the commands that it shows exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.main import app
from typer.main import get_command

README = (Path(__file__).resolve().parents[2] / "apps" / "cli" / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {})
    assert "steps = 100" in capsys.readouterr().out


def test_every_command_and_option_that_the_readme_shows_exists() -> None:
    shown = re.findall(r"anarcho ((?:[a-z]+ ?)+)([^`\n|]*)", README)
    checked = 0
    for words, rest in shown:
        command = get_command(app)
        names = words.split()
        while names and hasattr(command, "commands"):
            command = command.commands[names.pop(0)]  # pyright: ignore[reportAttributeAccessIssue]
        known = {option for parameter in command.params for option in parameter.opts}
        options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest.split("#")[0]))
        assert options <= known, f"{words}: {options - known}"
        checked += 1
    assert checked > 20


def test_the_table_of_commands_has_all_of_them() -> None:
    table = README.split("\n## Commands\n")[1].split("\n## ")[0]
    rows = {words.strip() for words in re.findall(r"^\| `anarcho ([a-z ]+)", table, re.MULTILINE)}
    rows |= {f"config {name}" for name in ("schema", "presets") if f"`{name}`" in table}
    commands: Any = get_command(app)
    for name, command in commands.commands.items():
        for leaf in getattr(command, "commands", {"": None}):
            assert f"{name} {leaf}".strip() in rows
