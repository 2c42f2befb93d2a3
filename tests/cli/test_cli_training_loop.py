"""The loop of a run as it is put together: what its speed is measured against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anarcho_cli import config as configuration
from anarcho_cli.training_loop import _throughput


def attempt_of(names: list[str]) -> Any:
    """An attempt of as many processes as there are devices, seen from the first one."""
    from anarcho_monitor import peak_flops

    ranks = SimpleNamespace(size=len(names), gathered=lambda own: np.array([[peak_flops(n) or 0.0] for n in names]))
    return SimpleNamespace(framework=SimpleNamespace(device_name=lambda device: names[0]), device="cuda", ranks=ranks)


@pytest.mark.parametrize(
    ("names", "peak"),
    [
        (["NVIDIA H100 80GB HBM3"] * 4, 4 * 989e12),
        (["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"], 989e12 + 312e12),
        (["NVIDIA H100 80GB HBM3", "NVIDIA of tomorrow"], None),
    ],
)
def test_utilisation_is_that_of_all_devices_whatever_each_is_and_unknown_where_one_is(names, peak):
    config = configuration.resolve(preset="quickstart")
    throughput = _throughput(attempt_of(names), config)
    throughput.finish_step(10**6)
    found = throughput.flop_utilisation
    if peak is None:
        assert found is None
    else:
        assert found == pytest.approx(config.flops_per_token * throughput.tokens_per_second / peak)
