"""Cases measured one after another, each in a process of its own: its peak of memory is its own, and its crash ends no other.

A case whose forecast exceeds the memory that is there is left out rather than driven into swapping. Where a case is given up, the
processes that it has started end with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from anarcho_cli.benching.cases import Case, Kind
from anarcho_cli.benching.updating import PEER_BYTES
from anarcho_cli.output import bytes_text
from anarcho_cli.plan import plan_run

COMMAND = (sys.executable, "-m", "anarcho_cli.benching")


def run_cases(
    cases: Sequence[Case],
    *,
    timeout_seconds: float,
    available_bytes: int,
    command: Sequence[str] = COMMAND,
    begin: Callable[[Case], None] = lambda case: None,
) -> Iterator[dict[str, Any]]:
    """A row for each case: what it is, its forecast, and its figures or the reason why there are none (`error`)."""
    for case in cases:
        forecast = forecast_bytes(case)
        row = {**describe(case), "forecast_bytes": forecast}
        if forecast is not None and case.device != "cuda" and forecast > available_bytes:
            needs, there = bytes_text(forecast), bytes_text(available_bytes)
            yield {**row, "error": f"left out: it needs {needs} by the forecast, and {there} are free"}
            continue
        begin(case)
        yield row | _run(case, timeout_seconds=timeout_seconds, command=command)


def describe(case: Case) -> dict[str, Any]:
    """What a case measures, as the beginning of its row."""
    named = {"kind": case.kind.value, "preset": case.preset}
    if case.kind is Kind.tokenizer:
        return named
    place = {"backend": case.backend, "device": case.device} if case.kind.needs_framework else {}
    return {
        **named,
        **place,
        "parameters": case.config.model.num_parameters,
        "micro_batch": case.config.train.micro_batch,
        "context": case.config.sequence_length,
        "flops_per_token": case.config.flops_per_token,
        "batch_tokens": case.config.train.batch_tokens,
        "gradient_checkpointing": case.config.train.gradient_checkpointing,
    }


def forecast_bytes(case: Case) -> int | None:
    """The peak of memory that `--dry-run` forecasts for the training, or what optimizers take; None for what is not forecast."""
    if case.kind not in (Kind.training, Kind.optimizer):
        return None
    plan = plan_run(case.config, device=case.device, backend=case.backend)
    if case.kind is Kind.training:
        return plan.total_bytes
    memory, peers = plan.memory, 2 * PEER_BYTES * case.config.trained_parameters
    return memory.weights + memory.gradients + memory.optimizer + memory.optimizer_scratch + peers + plan.library_bytes


def _run(case: Case, *, timeout_seconds: float, command: Sequence[str]) -> dict[str, Any]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, errors="replace", start_new_session=True) as process:
        try:
            output, errors = process.communicate(case.to_json(), timeout=timeout_seconds)
        except BaseException as error:
            with suppress(OSError):  # It may have ended by itself just now.
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return {
                    "error": f"it did not end within {timeout_seconds:g} s; give a longer --timeout or a smaller shape"
                }
            raise
    lines = output.strip().splitlines()
    if process.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": f"the process ended {_ending(process.returncode)}{_last_words(errors)}"}


def _ending(code: int) -> str:
    if code >= 0:
        return f"with status {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _last_words(text: str) -> str:
    line = last_line(text)
    return f": {line[:200]}" if line else ""


def last_line(text: str) -> str:
    """The last line of what a process has said that is not empty, or nothing."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
