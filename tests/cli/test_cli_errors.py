"""The error boundary: exit statuses, one sentence, and a traceback on request alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from anarcho_cli.errors import CommandGroup, explain
from typer.testing import CliRunner


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    app.command("generate")(fail)

    @app.callback()
    def options(debug: bool = False) -> None:
        """Global options."""

    return app


def outcome(error: BaseException, *arguments: str) -> tuple[int, str]:
    # The exception must come from one of our modules to be taken for one of ours.
    globals()["__name__"] = "anarcho_cli.pretended"
    result = CliRunner().invoke(app_that_raises(error), [*arguments, "fail"])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("train.steps is 0; expected more"), "train.steps is 0; expected more"),
        (ValueError("two\nlines"), "two lines"),
        (FileNotFoundError("the file x is not there; check the path"), "the file x is not there; check the path"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt: no such file or directory"),
        (FileExistsError("x exists already"), "x exists already"),
        (PermissionError(13, "Permission denied", "x.txt"), "x.txt: permission denied"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "pip install 'anarcho-cli[torch]'"),
        (ModuleNotFoundError("No module named 'mlx.core'", name="mlx.core"), "pip install 'anarcho-cli[mlx]'"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, ...)"), "out of memory (MPS"),
        (RuntimeError("[malloc] Unable to allocate 4194304 bytes."), "a smaller train.micro_batch"),
        (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), "out of memory ([metal::malloc]"),
        (RuntimeError("[METAL] ... (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"), "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "out of memory (CUDA"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(error: Exception, sentence: str) -> None:
    code, stderr = outcome(error)
    assert code == 2
    assert sentence in stderr
    assert stderr.startswith("anarcho: error: ")
    assert stderr.count("\n") == 1


def test_the_advice_for_too_little_memory_is_of_use_to_a_command_that_only_reads_a_model() -> None:
    error = RuntimeError("[malloc] Unable to allocate 4194304 bytes.")
    result = CliRunner().invoke(app_that_raises(error), ["generate"])
    assert result.exit_code == 2
    assert "max_position_embeddings" in result.stderr
    assert "train." not in result.stderr


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("x"), ModuleNotFoundError("no y", name="y")])
def test_a_defect_is_exit_status_1_and_a_hint_at_debug(error: Exception) -> None:
    code, stderr = outcome(error)
    assert code == 1
    assert "--debug" in stderr
    assert type(error).__name__ in stderr
    assert stderr.count("\n") == 1


def test_a_value_error_from_inside_a_library_is_a_defect() -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    message, code = explain(caught.value)
    assert code == 1
    assert "--debug" in message


def test_a_traceback_is_shown_only_with_debug() -> None:
    assert "Traceback" not in outcome(ValueError("x is wrong"))[1]
    code, stderr = outcome(ValueError("x is wrong"), "--debug")
    assert code == 2
    assert "Traceback" in stderr
    assert stderr.endswith("anarcho: error: x is wrong\n")


def test_an_interrupt_is_exit_status_130() -> None:
    code, stderr = outcome(KeyboardInterrupt())
    assert code == 130
    assert "Traceback" not in stderr


def test_an_exit_status_of_a_command_passes_through() -> None:
    assert outcome(typer.Exit(143))[0] == 143


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--nonsense"], ["pretrain", "--nonsense"], ["generate"], ["pretrain", "--device", "tpu"]],
)
def test_wrong_usage_is_exit_status_2(arguments: list[str], anarcho) -> None:
    result = anarcho(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert result.stdout == ""


def test_the_installed_command_reports_an_error_like_any_other(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "anarcho", "config", "show", "-c", tmp_path / "absent.toml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("anarcho: error: ")
    assert result.stderr.count("\n") == 1
