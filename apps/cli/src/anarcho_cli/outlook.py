"""What `anarcho plan` adds to a run's plan: what this machine has for it, the largest model that fits here, disk and time.

Notable: time is a range, because a step reaches a tenth (a small model on a CPU) to a half (a large one on a GPU) of the rate of bare
matrix products, which is measured; only steps themselves say more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarcho_train import free_bytes

from anarcho_cli.config import RunConfig
from anarcho_cli.disk_space import checkpoint_bytes, checkpoints_at_once
from anarcho_cli.fitting.budget import USED_SHARE, forecast_bytes, planning_budget
from anarcho_cli.output import bytes_text, count_text, duration_text
from anarcho_cli.plan import Plan, Processes

UTILISATION = (0.1, 0.5)
"""Least and greatest share of the rate of matrix products that whole training steps were seen to reach."""
HEAD_WIDTH = 64
"""Of the models among which the largest is sought; they have as many heads as layers, as most of this size do."""
MOST_LAYERS = 96
"""A model of so many layers has 43 billion parameters."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A plan, and what this machine has for it."""

    plan: Plan
    budget_bytes: int
    """Memory that the run may take here."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    checkpoints: int
    """How many there are at most at once."""
    free_bytes: int
    """On the disk where runs are kept."""
    largest: RunConfig | None
    """With the largest model that trains here; None where none does."""
    flops_per_second: float
    """Of bare matrix products."""

    @property
    def fits(self) -> bool:
        """Whether the forecast stays within what may be used."""
        return self.plan.total_bytes <= USED_SHARE * self.budget_bytes

    @property
    def seconds(self) -> tuple[float, float]:
        """The shortest and the longest time that the steps may take."""
        least, most = UTILISATION
        return self.plan.flops / (most * self.flops_per_second), self.plan.flops / (least * self.flops_per_second)

    def to_dict(self) -> dict[str, Any]:
        """The plan and the outlook as JSON."""
        largest = None
        if self.largest is not None:
            model = self.largest.model
            largest = {"num_layers": model.num_layers, "dim": model.dim, "parameters": model.num_parameters}
        return {
            **self.plan.to_dict(),
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "disk_bytes": {
                "checkpoint": self.checkpoint_bytes,
                "at_once": self.checkpoints * self.checkpoint_bytes,
                "free": self.free_bytes,
            },
            "largest_model": largest,
            "matmul_flops_per_second": self.flops_per_second,
            "seconds": list(self.seconds),
        }

    def lines(self) -> list[str]:
        """The outlook for people, one fact a line."""
        verdict = (
            "it fits" if self.fits else "it does not fit: take a smaller micro-batch, gradient checkpointing or model"
        )
        shortest, longest = (duration_text(seconds) for seconds in self.seconds)
        return [
            f"machine     {bytes_text(self.budget_bytes)} for the run, of which {USED_SHARE:.0%} are used; {verdict}",
            f"largest     {_model_text(self.largest)}",
            f"disk        {bytes_text(self.checkpoint_bytes)} a checkpoint, up to {self.checkpoints} at once; "
            f"{bytes_text(self.free_bytes)} are free",
            f"time        {shortest} to {longest}: steps reach {UTILISATION[0]:.0%} to {UTILISATION[1]:.0%} of the "
            f"{self.flops_per_second / 1e9:,.0f} GFLOP/s of matrix products here",
        ]


def look_out(
    plan: Plan, *, runs_dir: Path, flops_per_second: Callable[[], float], budget_bytes: int | None = None
) -> Outlook:
    """What this machine has for a plan; ``budget_bytes`` left out is what its device may probably hold."""
    budget = planning_budget(plan.device) if budget_bytes is None else budget_bytes
    config = plan.config
    return Outlook(
        plan=plan,
        budget_bytes=budget,
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoints=checkpoints_at_once(config),
        free_bytes=free_bytes(runs_dir),
        largest=largest_model(
            config, backend=plan.backend, device=plan.device, budget_bytes=budget, processes=plan.processes
        ),
        flops_per_second=flops_per_second() * _devices(plan),
    )


def _devices(plan: Plan) -> int:
    """How many compute: processes on one CPU share it."""
    if plan.processes is None:
        return 1
    return plan.processes.machines if plan.device == "cpu" else plan.processes.count


def largest_model(
    config: RunConfig, *, backend: str, device: str, budget_bytes: int, processes: Processes | None = None
) -> RunConfig | None:
    """The configuration with the largest model that trains in a budget: one sequence at once, gradient checkpointing, all else as it is."""
    train = dataclasses.replace(config.train, micro_batch=1, gradient_checkpointing=True)
    found = None
    for layers in range(2, MOST_LAYERS + 1, 2):
        model = dataclasses.replace(
            config.model,
            num_layers=layers,
            dim=HEAD_WIDTH * layers,
            num_heads=layers,
            num_kv_heads=None,
            head_dim=None,
            hidden_dim=None,
        )
        larger = dataclasses.replace(config, model=model, train=train)
        needed = forecast_bytes(
            larger, micro_batch=1, checkpointing=True, backend=backend, device=device, processes=processes
        )
        if needed > USED_SHARE * budget_bytes:
            break
        found = larger
    return found


def _model_text(config: RunConfig | None) -> str:
    if config is None:
        return "no model trains in this memory"
    model = config.model
    return (
        f"{count_text(model.num_parameters)} parameters, {model.num_layers} layers of {model.dim}, with one sequence of "
        f"{config.sequence_length} tokens at once and gradient checkpointing"
    )
