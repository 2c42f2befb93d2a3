"""Help and version: complete, quick, and without a framework."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.main import app
from typer.main import get_command

COMMANDS = [
    "bench",
    "chat",
    "checkpoint list",
    "checkpoint verify",
    "config presets",
    "config schema",
    "config show",
    "data inspect",
    "data merge",
    "data prepare",
    "doctor",
    "eval",
    "export",
    "generate",
    "import",
    "launch",
    "pipeline run",
    "plan",
    "preference",
    "pretrain",
    "report",
    "serve",
    "sft",
    "tokenizer import",
    "tokenizer inspect",
    "tokenizer train",
    "watch",
]


def leaves(command: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Path of each command that is no group -> the command."""
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    return {name: leaf for key, child in command.commands.items() for name, leaf in leaves(child, (*path, key)).items()}


def test_the_tree_of_commands_is_complete() -> None:
    assert sorted(leaves(get_command(app))) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_explains_itself(name: str, anarcho) -> None:
    command = leaves(get_command(app))[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name
    result = anarcho(*name.split(), "-h")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: anarcho")


def test_the_plan_speaks_of_no_run_because_it_has_none(anarcho) -> None:
    text = " ".join(anarcho("plan", "--help").stdout.split()).lower()
    assert "--json" in text
    assert "resuming" not in text
    assert "run directory" not in text


def test_version_is_the_installed_one(anarcho) -> None:
    assert anarcho("--version").stdout == f"anarcho {version('anarcho-cli')}\n"


def test_no_command_shows_the_help(anarcho) -> None:
    assert "pretrain" in anarcho().output


def test_help_loads_neither_torch_nor_mlx_nor_numpy_nor_pydantic() -> None:
    program = (
        "import sys, json; from anarcho_cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "mlx", "numpy", "pydantic", "rich", "anarcho_model"} & set(json.loads(result.stderr))
    assert "pretrain" in result.stdout


def test_help_takes_under_three_tenths_of_a_second(tmp_path: Path) -> None:
    # An installed program has its bytecode; the first run writes it, whatever this environment says. Processor time is
    # what the program itself takes, however busy the machine is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    command = [Path(sys.executable).parent / "anarcho", "--help"]
    seconds = []
    for _ in range(4):
        start = processor_seconds()
        subprocess.run(command, capture_output=True, check=True, env=environment)
        seconds.append(processor_seconds() - start)
    assert min(seconds[1:]) < 0.3, seconds


def processor_seconds() -> float:
    """Processor time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
