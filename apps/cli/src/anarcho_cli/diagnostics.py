"""What may be looked at besides while a run trains: `--profile` and `--detect-anomaly`; none of it changes what is learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from anarcho_train import Loop
    from anarcho_train.anomalies import ExplainingStep


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What is looked at."""

    profile: bool = False
    """Whether a few steps and a checkpoint are recorded by the framework's profiler."""
    detect_anomaly: bool = False
    """Whether the first loss or gradient that is not finite ends the run with an explanation."""

    def require_possible(self, *, backend: str) -> None:
        """Refuses what the framework does not have here, before a run begins; raises `ConfigError`."""
        if self.profile:
            from anarcho_cli.profiling import require_profiler

            require_profiler(backend=backend)


@contextmanager
def diagnosed(loop: Loop, run_directory: Path, wanted: Diagnostics, *, backend: str, device: str) -> Iterator[None]:
    """Looks at the loop as ``wanted`` while it runs."""
    if wanted.detect_anomaly:
        from anarcho_train import AnomalyDetection

        loop.step = AnomalyDetection(cast("ExplainingStep", loop.step))
    if not wanted.profile:
        yield
        return
    from anarcho_cli.profiling import ProfiledThroughput, open_profile

    profile = open_profile(run_directory, backend=backend, device=device)
    loop.throughput = ProfiledThroughput(loop.throughput, profile)
    try:
        yield
    finally:
        profile.close()
