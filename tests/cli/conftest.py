"""The command line inside the test's own process, which is far quicker than a process per command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.main import app
from typer.testing import CliRunner

# `served.py` is shared by several tests of the server.
sys.path.insert(0, str(Path(__file__).parent))

Anarcho = Callable[..., Any]


@pytest.fixture
def anarcho() -> Anarcho:
    """Run `anarcho ARGUMENTS` and return exit_code, stdout and stderr."""
    return lambda *arguments, **options: CliRunner().invoke(app, [str(item) for item in arguments], **options)


@pytest.fixture
def refused(anarcho: Anarcho) -> Callable[..., str]:
    """Run a command that must fail for bad input; returns its one line on standard error."""

    def run(*arguments: object, **options: Any) -> str:
        result = anarcho(*arguments, **options)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("anarcho: error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    return run
