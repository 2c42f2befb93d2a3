"""One attempt at a run: where the run is kept, and what computes it; the parts of the composition hand it on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from anarcho_train import Ranks

from anarcho_cli.back_ends import BackEnd, back_end
from anarcho_cli.config import RunConfig
from anarcho_cli.shared_run import require_together


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run directory with the framework, the device and the processes that train in it from now on."""

    run_directory: Path
    framework: BackEnd
    device: str
    ranks: Ranks
    started: float = field(default_factory=time.monotonic)
    """Seconds of the monotonic clock."""

    @property
    def seconds(self) -> float:
        """Wall time since it began."""
        return time.monotonic() - self.started


def begin(run_directory: Path, config: RunConfig, *, backend: str, device: str, ranks: Ranks) -> Attempt:
    """An attempt that these processes can make together; raises what says why they cannot."""
    attempt = Attempt(run_directory=run_directory, framework=back_end(backend), device=device, ranks=ranks)
    attempt.framework.require_supported(config, device)
    require_together(config, ranks, framework=backend, device=device)
    return attempt
