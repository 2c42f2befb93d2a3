"""The command line inside the test's own process, which is far quicker than a process per command, and a real browser for its pages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anarcho_cli.main import app
from typer.testing import CliRunner

# `bases.py`, `colours.py`, `reported.py` and `served.py` are shared by several tests.
sys.path.insert(0, str(Path(__file__).parent))

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is installed on the machine, or that playwright has installed; without either the test is skipped and says so."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium could be started: {error.message.splitlines()[0]}")
        yield browser
        browser.close()
