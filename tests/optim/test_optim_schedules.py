"""Schedules rise to the top, stay within (0, 1] and end where they say; bad settings are refused by name."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from anarcho_optim import OptimConfig, schedules
from hypothesis import given
from hypothesis import strategies as st


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 100),
    final=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
)
def test_every_schedule_stays_between_zero_and_one_and_never_rises_after_the_warmup(total, warmup, final, shape):
    config = OptimConfig(schedule=shape, warmup_steps=warmup, final_lr_fraction=final)
    values = [schedules.lr_scale(config, step, total_steps=total) for step in range(total)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    tail = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(tail))


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_a_schedule_reaches_the_top_after_the_warmup_and_its_final_fraction_at_the_end(shape):
    config = OptimConfig(schedule=shape, warmup_steps=10, final_lr_fraction=0.1)
    assert schedules.lr_scale(config, 0, total_steps=100) == pytest.approx(0.1)
    assert schedules.lr_scale(config, 10, total_steps=100) == pytest.approx(1.0)
    assert schedules.lr_scale(config, 100, total_steps=100) == pytest.approx(0.1)


def test_cosine_is_the_published_formula():
    value = schedules.cosine(30, total_steps=110, warmup_steps=10, final_fraction=0.2)
    assert value == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.2)) / 2)


def test_momentum_warms_up_linearly_and_then_stays():
    config = OptimConfig(momentum=0.95, momentum_warmup_steps=300)
    assert schedules.momentum(config, 0) == pytest.approx(0.85)
    assert schedules.momentum(config, 150) == pytest.approx(0.90)
    assert schedules.momentum(config, 1000) == pytest.approx(0.95)
    assert schedules.momentum(OptimConfig(momentum=0.9), 0) == 0.9


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"adamw_lr": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"final_lr_fraction": 1.5},
        {"variant": "newton"},
        {"schedule": "step"},
        {"adjust_lr_fn": "none"},
    ],
)
def test_a_bad_setting_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"optim.{next(iter(settings))}"):
        OptimConfig(**settings)


def test_importing_the_package_loads_no_framework():
    code = "import sys, anarcho_optim, anarcho_optim.schedules; print('torch' in sys.modules, 'mlx' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]
