"""What a run may choose about its monitoring; validated once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from anarcho_monitor.errors import MonitorError


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Settings of the section `[monitor]`."""

    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl (needs the extra `tensorboard`)."""
    progress: bool = True
    """Show progress: a live bar on a terminal, plain lines elsewhere."""
    progress_seconds: float = 10.0
    """Least number of seconds from one plain progress line to the next."""
    peak_flops: float | None = None
    """Peak FLOP/s of the device in the precision used, for the FLOP utilisation; None looks the device up by name."""

    def __post_init__(self) -> None:
        if not self.progress_seconds >= 0:
            raise MonitorError(
                f"monitor.progress_seconds is {self.progress_seconds}, but it must be 0 or more seconds: raise it."
            )
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise MonitorError(
                f"monitor.peak_flops is {self.peak_flops}, but it must be a positive number of FLOP/s: "
                "correct it or leave it out."
            )
