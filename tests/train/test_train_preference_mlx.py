"""Preference tuning in MLX: values and gradients are those of the torch losses, and do not depend on the split of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import torch
from anarcho_train import PreferenceConfig, StepSchedule
from anarcho_train.losses import mlx as mlx_losses
from anarcho_train.losses import mlx_preference, torch_preference
from anarcho_train.losses import torch as torch_losses

from .mlx_bigram import flat, make_step
from .test_train_preference import ALL, NAMES, make_pairs

SCHEDULE = StepSchedule(lr_scale=1.0)


def in_torch(config: PreferenceConfig, logprobs: np.ndarray, pairs) -> tuple[float, np.ndarray, dict[str, float]]:
    loss = torch_preference.PreferenceLoss(config)
    arrays = {name: torch.from_numpy(array) for name, array in loss.arrays(pairs).items()}
    leaf = torch.from_numpy(logprobs).requires_grad_()
    value, measures = loss(leaf, arrays)
    value.backward()
    return (
        float(value.detach()),
        leaf.grad.numpy(),
        {name: float(measure.detach()) for name, measure in measures.items()},
    )


def in_mlx(config: PreferenceConfig, logprobs: np.ndarray, pairs) -> tuple[float, np.ndarray, dict[str, float]]:
    loss = mlx_preference.PreferenceLoss(config)
    arrays = {name: mx.array(array) for name, array in loss.arrays(pairs).items()}
    (value, measures), gradient = mx.value_and_grad(lambda x: loss(x, arrays))(mx.array(logprobs))
    return value.item(), np.array(gradient), {name: measure.item() for name, measure in measures.items()}


@pytest.mark.parametrize("config", ALL, ids=NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.05, 1.0, 6.0, 1e4])
def test_value_gradient_and_measures_are_those_of_torch(config, scale):
    pairs = make_pairs(7, padding=2)
    logprobs = -scale * np.random.default_rng(1).exponential(1.0, pairs.weights.shape).astype(np.float32)
    ours, theirs = in_mlx(config, logprobs, pairs), in_torch(config, logprobs, pairs)
    assert math.isfinite(ours[0])
    assert ours[0] == pytest.approx(theirs[0], rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-4, atol=1e-6)
    assert ours[2] == pytest.approx(theirs[2], rel=2e-5, abs=1e-5)


def test_the_sums_over_tokens_are_those_of_torch():
    random = np.random.default_rng(0)
    logprobs, weights = (random.standard_normal((3, 5)).astype(np.float32) for _ in range(2))
    for name in ("next_token_loss", "answer_logprobs"):
        ours = getattr(mlx_losses, name)(mx.array(logprobs), mx.array(weights))
        theirs = getattr(torch_losses, name)(torch.from_numpy(logprobs), torch.from_numpy(weights))
        np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-5)


def test_a_policy_that_is_its_reference_has_a_dpo_loss_of_ln_2_and_no_divergence():
    step = make_step(loss=mlx_preference.PreferenceLoss(PreferenceConfig()), compile="on")
    pairs = make_pairs(5, padding=1)
    pairs.reference = step.answer_logprobs(pairs)
    total = step.evaluate(pairs)
    assert total.weight == 5
    assert total.loss / total.weight == pytest.approx(math.log(2), rel=1e-6)
    assert total.means() == {"reward_chosen": 0, "reward_rejected": 0, "margin": 0, "accuracy": 0, "kl": 0}
    first = step.train([pairs], schedule=SCHEDULE)
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    for _ in range(20):
        step.train([pairs], schedule=SCHEDULE)
    assert step.evaluate(pairs).loss < total.loss
    assert step.evaluate(pairs).means()["accuracy"] == 1


@pytest.mark.parametrize("rows", [2, 6])
def test_any_split_of_the_pairs_makes_the_same_update_and_measures(rows):
    pairs = make_pairs(11, padding=1)
    loss = mlx_preference.PreferenceLoss(PreferenceConfig(label_smoothing=0.1))
    whole, parts = (make_step(optimizer="plain", grad_clip=0.0, loss=loss) for _ in range(2))
    one = whole.train([pairs], schedule=SCHEDULE)
    many = parts.train([pairs.part(slice(i, i + rows)) for i in range(0, 24, rows)], schedule=SCHEDULE)
    assert many.weight == one.weight == 11
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.measures == pytest.approx(one.measures, rel=1e-5, abs=1e-6)
    for name, value in flat(whole.model.parameters()).items():
        np.testing.assert_allclose(flat(parts.model.parameters())[name], value, atol=1e-6)


def test_a_batch_without_the_reference_that_the_loss_needs_is_refused_before_the_model_works():
    pairs = make_pairs(2)
    pairs.reference = None
    step = make_step(loss=mlx_preference.PreferenceLoss(PreferenceConfig(loss="kto")))
    with pytest.raises(ValueError, match=r"preference.loss is kto, but the batch has no reference.*compute them first"):
        step.evaluate(pairs)
    with pytest.raises(ValueError, match=r"3 rows; expected pairs"):
        mlx_preference.PreferenceLoss(PreferenceConfig()).weight(pairs.part(slice(0, 3)))
