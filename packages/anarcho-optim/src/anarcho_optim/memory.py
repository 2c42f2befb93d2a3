"""What an update needs besides parameters, gradients and state; free of any framework, for forecasts before a run."""

from __future__ import annotations

BATCH_BYTES = 32 * 2**20
"""Largest float32 stack of same-shape matrices that one batched iteration works on (a larger single matrix is a stack by itself)."""

SCRATCH_BYTES = 4 * BATCH_BYTES
"""Upper bound of Muon's temporary memory while no matrix exceeds `BATCH_BYTES`: the update, its normalised copy, the iterate before and
after a step in half precision, and the result."""
