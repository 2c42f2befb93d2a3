"""`--profile`: what a few steps and a checkpoint spend their time on, recorded by the framework's own profiler.

Notable: the first steps compile and fill caches, so those after them are recorded. PyTorch's trace is Chrome's format, for Perfetto
(ui.perfetto.dev) or chrome://tracing, with the ranges data, forward, backward (one range where they are CUDA graphs), optimizer, validation
and checkpoint; a table beside it sums up the operations. MLX has a capture of Metal's, for Xcode, and nothing where there is no Metal.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from anarcho_train.interfaces import Throughput

from anarcho_cli.layers import ConfigError
from anarcho_cli.output import note

PROFILE = "profile"
"""The folder of a run for what was recorded."""

SKIPPED_STEPS = 2
RECORDED_STEPS = 3
TABLE_ROWS = 30


class Profile(Protocol):
    """A recording that follows a run."""

    def begin(self, first_step: int) -> None:
        """The run goes on after ``first_step`` steps."""
        ...

    def finish_step(self) -> None:
        """A step has ended."""
        ...

    def range(self, name: str) -> Any:
        """Gives a name to what is done within."""
        ...

    def close(self) -> None:
        """The run has ended; what was recorded is written."""
        ...


def open_profile(run_directory: Path, *, backend: str, device: str) -> Profile:
    """A recording into the run's folder; raises `ConfigError` where the framework cannot record here."""
    directory = run_directory / PROFILE
    return TorchProfile(directory, device=device) if backend == "torch" else MetalCapture(directory)


def require_profiler(*, backend: str) -> None:
    """Refuses a recording that is not possible, before a run begins."""
    if backend == "mlx":
        import mlx.core as mx

        if not mx.metal.is_available():
            raise ConfigError(
                "--profile with --backend mlx records a Metal capture, and there is no Metal here; expected a Mac with an Apple GPU: "
                "use --backend torch"
            )
        if os.environ.get("MTL_CAPTURE_ENABLED") != "1":
            raise ConfigError(
                "--profile with --backend mlx needs MTL_CAPTURE_ENABLED=1 in the environment, which Metal reads when the process starts; "
                "run `MTL_CAPTURE_ENABLED=1 anarcho ...`"
            )


class ProfiledThroughput:
    """A `Throughput` that tells a profile what the loop tells it."""

    def __init__(self, inner: Throughput, profile: Profile) -> None:
        self._inner, self._profile = inner, profile

    def begin(self, first_step: int) -> None:
        self._profile.begin(first_step)
        self._inner.begin(first_step)

    def finish_step(self, tokens: int) -> None:
        self._inner.finish_step(tokens)
        self._profile.finish_step()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        with self._profile.range("data"), self._inner.waiting():
            yield

    @contextmanager
    def pause(self, name: str, *, every: int | None = None) -> Iterator[None]:
        # What the profile itself takes is part of the pause, or it would count as a slow step.
        with self._inner.pause(name, every=every), self._profile.range(name):
            yield

    def metrics(self) -> dict[str, float]:
        return self._inner.metrics()


class TorchProfile:
    """PyTorch's profiler over `RECORDED_STEPS` steps, and over the first checkpoint outside of them."""

    def __init__(self, directory: Path, *, device: str) -> None:
        self._directory, self._device = directory, device
        self._skipped = SKIPPED_STEPS
        if device == "cuda":
            from anarcho_train.steps.torch_graphs import WARM

            self._skipped = WARM + 1  # The step after those may make CUDA graphs of its passes.
        self._step = self._first = 0
        self._steps: Any = None
        self._recorded = self._saved = False

    def begin(self, first_step: int) -> None:
        self._step = self._first = first_step

    def finish_step(self) -> None:
        self._step += 1
        done = self._step - self._first
        if done == self._skipped and not self._recorded:
            self._steps = self._start()
        elif self._steps is not None and done == self._skipped + RECORDED_STEPS:
            self._write_steps()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        from torch.profiler import record_function

        alone = name == "checkpoint" and not self._saved and self._steps is None
        self._saved = self._saved or name == "checkpoint"
        profile = self._start() if alone else None
        try:
            with record_function(name):
                yield
        finally:
            if profile is not None:
                self._stop(profile, f"checkpoint-{self._step}")

    def close(self) -> None:
        if self._steps is not None and self._step > self._first + self._skipped:
            self._write_steps()
        elif self._steps is not None or not self._recorded:
            note(f"the run ended before the steps that --profile records, which come after the first {self._skipped}")

    def _start(self) -> Any:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # Its library says on standard error that there is no GPU.
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device == "cuda" else [])
        recording = profile(activities=activities, record_shapes=True)
        recording.start()
        return recording

    def _write_steps(self) -> None:
        profile, self._steps, self._recorded = self._steps, None, True
        self._stop(profile, f"steps-{self._first + self._skipped + 1}-to-{self._step}")

    def _stop(self, profile: Any, name: str) -> None:
        """Writes the trace under its name when it is whole, and the table beside it."""
        profile.stop()
        self._directory.mkdir(exist_ok=True)
        trace, staging = self._directory / f"{name}.json", self._directory / f".{name}.partial-{os.getpid()}.json"
        profile.export_chrome_trace(str(staging))
        staging.replace(trace)
        order = "self_cuda_time_total" if self._device == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=60)
        (self._directory / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        note(f"profile: {trace}")


class MetalCapture:
    """A capture of one step's commands by Metal; more than one would be gigabytes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._step = self._first = 0
        self._trace: Path | None = None
        self._recorded = False

    def begin(self, first_step: int) -> None:
        self._step = self._first = first_step

    def finish_step(self) -> None:
        import mlx.core as mx

        self._step += 1
        if self._trace is not None:
            self.close()
        elif self._step - self._first == SKIPPED_STEPS and not self._recorded:
            self._directory.mkdir(exist_ok=True)
            self._trace = self._directory / f"step-{self._step + 1}.gputrace"
            shutil.rmtree(self._trace, ignore_errors=True)  # Metal refuses a place that is taken.
            mx.synchronize()
            mx.metal.start_capture(str(self._trace))

    def range(self, name: str) -> Any:
        return nullcontext()

    def close(self) -> None:
        import mlx.core as mx

        if self._trace is not None:
            mx.synchronize()  # An update may be under way still.
            mx.metal.stop_capture()
            note(f"profile: {self._trace}")
            self._trace, self._recorded = None, True
        elif not self._recorded:
            note(f"the run ended before the step that --profile records, which comes after the first {SKIPPED_STEPS}")
