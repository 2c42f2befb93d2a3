"""Finding the micro-batch, and whether activations are computed again, before the first step.

Notable: the global batch is as configured whatever is found here. The forecast decides alone where it is far from the budget, as for small
models; near it, two sizes are measured, and a line through them says how many sequences fit. What is found is part of the run: one that
goes on keeps it, so that its steps are cut alike, unless it does not fit any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anarcho_train import LinearPeak, Ranks, divisors

from anarcho_cli.config import RunConfig
from anarcho_cli.fitting.budget import LEAST_TOKENS, USED_SHARE, USEFUL_TOKENS, forecast_bytes, with_size
from anarcho_cli.output import bytes_text
from anarcho_cli.plan import Processes

FORECAST_SHARE = 0.5
"""Up to this share of what may be used, the forecast need not be checked; it was never wrong by a half."""

Probe = Callable[[RunConfig, Sequence[int]], "Probed"]
"""Measures the peaks of steps with micro-batches of these sizes, the smallest first."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a probe has found."""

    peaks: dict[int, int]
    """Micro-batch -> bytes at the peak, of those that fitted."""
    failure: str = ""
    """Why the others have none."""
    out_of_memory: bool = False
    """Whether that was for want of memory."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was found, and why."""

    micro_batch: int
    """Sequences that go through the model at once."""
    gradient_checkpointing: bool
    """Whether activations are computed again."""
    needed_bytes: int
    """The peak that is expected."""
    budget_bytes: int
    """Memory that the process may hold."""
    sequences: int
    """Sequences of a step, or of one of its batches of pairs."""
    reason: str
    """In words."""
    peaks: dict[int, int] = field(default_factory=dict)
    """Micro-batch -> measured bytes."""

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with what was found in place of `auto`."""
        return with_size(config, micro_batch=self.micro_batch, checkpointing=self.gradient_checkpointing)

    def facts(self) -> dict[str, Any]:
        """What the run's record says of it; `recorded` reads it back."""
        return {
            "micro_batch": self.micro_batch,
            "gradient_checkpointing": self.gradient_checkpointing,
            "needed_bytes": self.needed_bytes,
            "budget_bytes": self.budget_bytes,
        }

    def event(self) -> dict[str, Any]:
        """The journal's line."""
        again = ", with gradient checkpointing" if self.gradient_checkpointing else ""
        return {
            "message": f"micro-batch {self.micro_batch} of {self.sequences} sequences{again}: {self.reason}",
            **self.facts(),
            "probed_bytes": {str(size): peak for size, peak in self.peaks.items()},
        }


def is_open(config: RunConfig) -> bool:
    """Whether there is anything to find."""
    return "auto" in (config.train.micro_batch, config.train.gradient_checkpointing)


def kept(config: RunConfig, record: Mapping[str, Any], *, backend: str, device: str, budget_bytes: int) -> Fit | None:
    """What an earlier attempt found, if it was on such a device and fits still; ``record`` has `Fit.facts` and where it trained."""
    size, needed = record.get("micro_batch"), record.get("needed_bytes")
    same = record.get("backend") == backend and record.get("device") == device
    if not (same and isinstance(size, int) and isinstance(needed, int)) or _candidates(config)[-1] % size:
        return None
    if needed > USED_SHARE * budget_bytes:
        return None
    return Fit(
        micro_batch=size,
        gradient_checkpointing=record.get("gradient_checkpointing") is True,
        needed_bytes=needed,
        budget_bytes=budget_bytes,
        sequences=_candidates(config)[-1],
        reason="as before",
    )


def agreed(fit: Fit | None, ranks: Ranks) -> Fit | None:
    """The smallest of what the processes of a run have found, so that their steps are cut alike."""
    if fit is None:
        return None
    found = ranks.gathered([fit.micro_batch, fit.gradient_checkpointing, fit.needed_bytes])
    return replace(
        fit,
        micro_batch=int(found[:, 0].min()),
        gradient_checkpointing=bool(found[:, 1].any()),
        needed_bytes=int(found[:, 2].max()),
    )


def find(
    config: RunConfig,
    *,
    backend: str,
    device: str,
    budget_bytes: int,
    probe: Probe | None,
    processes: Processes | None = None,
) -> Fit:
    """The largest useful micro-batch that fits, of one process or of each of several; without a ``probe``, by the forecast alone."""
    search = _Search(config, backend=backend, device=device, budget_bytes=budget_bytes, processes=processes)
    return search.run(probe)


class _Search:
    def __init__(
        self, config: RunConfig, *, backend: str, device: str, budget_bytes: int, processes: Processes | None
    ) -> None:
        self._config, self._backend, self._device, self._processes = config, backend, device, processes
        self._budget, self._limit = budget_bytes, USED_SHARE * budget_bytes
        self._length = config.sequence_length
        self._family = device if device in USEFUL_TOKENS else "cpu"
        sizes = _candidates(config, processes)
        self._sequences = sizes[-1]
        open_size = config.train.micro_batch == "auto"
        useful = [size for size in sizes if size * self._length <= USEFUL_TOKENS[self._family]]
        self._sizes = (useful or sizes[:1]) if open_size else [config.train.fixed_micro_batch]

    def run(self, probe: Probe | None) -> Fit:
        checkpointing = self._choose_checkpointing()
        size = self._largest(lambda n: self._forecast(n, checkpointing)) or self._sizes[0]
        largest = self._sizes[-1]
        far = self._forecast(largest, checkpointing) <= FORECAST_SHARE * self._limit
        settled = len(self._sizes) == 1 and (checkpointing or self._config.train.gradient_checkpointing != "auto")
        if far or settled or probe is None:
            how = f"the forecast of {bytes_text(self._forecast(size, checkpointing))}"
            reason = f"{how} {'is far below' if far else 'fits' if self._fits(size, checkpointing) else 'exceeds'} the budget"
            return self._fit(size, checkpointing, needed=self._forecast(size, checkpointing), reason=reason, peaks={})
        return self._measured(probe, size, checkpointing)

    def _measured(self, probe: Probe, size: int, checkpointing: bool) -> Fit:
        below = [n for n in self._sizes if n < size][-1:]
        sizes = [*below, size] if below else self._sizes[:2]
        found = probe(with_size(self._config, micro_batch=size, checkpointing=checkpointing), sizes)
        peak = self._peak(found, checkpointing)
        none_fits = peak(self._sizes[0]) > self._limit if found.peaks else found.out_of_memory
        if none_fits and not checkpointing and self._config.train.gradient_checkpointing == "auto":
            size = self._largest(lambda n: self._forecast(n, True)) or self._sizes[0]
            return self._measured(probe, size, True)
        largest = 2 * max(found.peaks, default=size)  # A line through two sizes says little of much larger ones.
        if found.out_of_memory:
            largest = max(found.peaks, default=self._sizes[0])
        chosen = max((n for n in self._sizes if n <= largest and peak(n) <= self._limit), default=self._sizes[0])
        measured = ", ".join(f"{n} took {bytes_text(bytes_)}" for n, bytes_ in found.peaks.items())
        failed = f"; the others could not be measured: {found.failure}" if found.failure else ""
        return self._fit(
            chosen,
            checkpointing,
            needed=int(peak(chosen)),
            reason=f"{measured or 'by the forecast'}{failed}",
            peaks=found.peaks,
        )

    def _peak(self, found: Probed, checkpointing: bool) -> Callable[[int], float]:
        """The peak that is expected of each size: the line through two, the forecast in the proportion of one, or the forecast."""
        if len(found.peaks) > 1:
            return LinearPeak.fit(found.peaks)
        ratio = 1.0
        for size, measured in found.peaks.items():
            ratio = measured / self._forecast(size, checkpointing)
        return lambda size: ratio * self._forecast(size, checkpointing)

    def _choose_checkpointing(self) -> bool:
        asked = self._config.train.gradient_checkpointing
        if isinstance(asked, bool):
            return asked
        without = self._largest(lambda n: self._forecast(n, False))
        if without is None:
            return True
        least = min(LEAST_TOKENS[self._family], self._sizes[-1] * self._length)
        return without * self._length < least and (self._largest(lambda n: self._forecast(n, True)) or 0) > without

    def _largest(self, peak: Callable[[int], float]) -> int | None:
        return max((size for size in self._sizes if peak(size) <= self._limit), default=None)

    def _fits(self, size: int, checkpointing: bool) -> bool:
        return self._forecast(size, checkpointing) <= self._limit

    def _forecast(self, size: int, checkpointing: bool) -> int:
        return forecast_bytes(
            self._config,
            micro_batch=size,
            checkpointing=checkpointing,
            backend=self._backend,
            device=self._device,
            processes=self._processes,
        )

    def _fit(self, size: int, checkpointing: bool, *, needed: int, reason: str, peaks: dict[int, int]) -> Fit:
        return Fit(
            micro_batch=size,
            gradient_checkpointing=checkpointing,
            needed_bytes=needed,
            budget_bytes=self._budget,
            sequences=self._sequences,
            reason=f"{reason}; {bytes_text(self._budget)} may be used, and {USED_SHARE:.0%} of it are",
            peaks=peaks,
        )


def _candidates(config: RunConfig, processes: Processes | None = None) -> list[int]:
    """The sizes that divide a step, or one of several processes' share of it, or a batch of pairs."""
    if config.data.kind == "preference":
        return divisors(config.bucket_sequences)
    return divisors(max(1, config.batch_sequences // (processes.count if processes else 1)))
