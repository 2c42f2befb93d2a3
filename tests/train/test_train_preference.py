"""Preference tuning: each loss agrees with its formula in float64, has its own gradient, and does not depend on the split of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from anarcho_train import PreferenceConfig, StepSchedule
from anarcho_train.losses import torch_preference as losses
from anarcho_train.losses.torch_preference import PreferenceLoss

from .conftest import VOCABULARY, Bigram, make_step, run_until

SCHEDULE = StepSchedule(lr_scale=1.0)
ALL = [
    PreferenceConfig(),
    PreferenceConfig(beta=0.3, label_smoothing=0.1),
    PreferenceConfig(length_normalization=True),
    PreferenceConfig(loss="ipo"),
    PreferenceConfig(loss="ipo", beta=0.5, length_normalization=False),
    PreferenceConfig(loss="simpo", gamma=0.7),
    PreferenceConfig(loss="simpo", label_smoothing=0.2),
    PreferenceConfig(loss="orpo", beta=0.4),
    PreferenceConfig(loss="kto", desirable_weight=1.0, undesirable_weight=1.3),
]
NAMES = [f"{c.loss}-{i}" for i, c in enumerate(ALL)]


@dataclass
class Pairs:
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    reference: np.ndarray | None = None
    positions: np.ndarray | None = None
    segments: np.ndarray | None = None

    def part(self, rows: slice) -> Pairs:
        reference = None if self.reference is None else self.reference[rows]
        return Pairs(self.tokens[rows], self.targets[rows], self.weights[rows], reference)


def make_pairs(count: int, *, padding: int = 0, length: int = 6, seed: int = 0) -> Pairs:
    """Answers of 1 to ``length`` tokens behind prompts; the last ``padding`` pairs are padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(VOCABULARY, size=(2 * (count + padding), length + 1)).astype(np.int32)
    weights = np.zeros((len(tokens), length), np.float32)
    for row in range(2 * count):
        weights[row, random.integers(length) :] = 1
    reference = np.where(weights.any(axis=1), -random.exponential(3, len(tokens)), 0).astype(np.float32)
    return Pairs(tokens[:, :-1], tokens[:, 1:], weights, reference)


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def expected(config: PreferenceConfig, logprobs: np.ndarray, pairs: Pairs) -> float:
    """The sum of the loss over pairs, written down again from the papers in float64."""
    weights = pairs.weights.astype(np.float64)
    kept = weights.any(axis=1)
    sums, lengths = (logprobs * weights).sum(1)[kept], weights.sum(1)[kept]
    ratios = sums - pairs.reference.astype(np.float64)[kept]
    smoothing = config.label_smoothing
    if config.loss in ("simpo", "orpo"):
        values = sums / lengths
    elif config.length_normalization or (config.loss == "ipo" and config.length_normalization is None):
        values = ratios / lengths
    else:
        values = ratios
    won, lost = values[0::2], values[1::2]
    beta = config.beta or {"simpo": 2.0}.get(config.loss, 0.1)
    if config.loss == "ipo":
        return float(((won - lost - 1 / (2 * beta)) ** 2).sum())
    if config.loss == "orpo":
        odds_w, odds_l = np.exp(won) / (1 - np.exp(won)), np.exp(lost) / (1 - np.exp(lost))
        return float((-won - beta * np.log(1 / (1 + odds_l / odds_w))).sum())
    if config.loss == "kto":
        z_w, z_l = max(0, lost.mean()), max(0, won.mean())
        good, bad = 1 / (1 + np.exp(-beta * (won - z_w))), 1 / (1 + np.exp(-beta * (z_l - lost)))
        weighted = config.desirable_weight * (1 - good) + config.undesirable_weight * (1 - bad)
        return float(weighted.sum() / 2)
    margin = beta * (won - lost) - (config.gamma if config.loss == "simpo" else 0)
    return float((-(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)).sum())


def computed(config: PreferenceConfig, logprobs: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, dict]:
    loss = PreferenceLoss(config)
    arrays = {name: torch.from_numpy(array).to(logprobs.dtype) for name, array in loss.arrays(pairs).items()}
    return loss(logprobs, arrays)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
def test_a_loss_is_the_sum_of_its_formula_over_the_pairs_that_are_no_padding(config, scale):
    pairs = make_pairs(7, padding=2)
    logprobs = -np.random.default_rng(1).exponential(scale, pairs.weights.shape).astype(np.float32)
    loss, _ = computed(config, torch.from_numpy(logprobs), pairs)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected(config, logprobs.astype(np.float64), pairs), rel=2e-5)
    assert PreferenceLoss(config).weight(pairs) == 7


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_the_gradient_is_that_of_finite_differences(config):
    pairs = make_pairs(3, padding=1, length=3)
    torch.manual_seed(2)
    logprobs = -torch.rand(pairs.weights.shape, dtype=torch.float64) - 0.1
    if config.loss == "kto":  # Its points of reference have no gradient by definition: without them, they are constant.
        pairs.reference += 50 * pairs.weights.any(axis=1)
        pairs.reference = np.where(pairs.weights.any(axis=1), np.abs(pairs.reference), 0).astype(np.float32)
    assert torch.autograd.gradcheck(lambda x: computed(config, x, pairs)[0], logprobs.requires_grad_())


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ("dpo", -math.log(1 / (1 + math.exp(-0.1 * 3)))),
        ("ipo", (3 / 2 - 5) ** 2),
        ("simpo", -math.log(1 / (1 + math.exp(-(2 * 0.5 - 1))))),
        ("orpo", 1 - 0.1 * math.log(1 / (1 + (math.exp(-1.5) / (1 - math.exp(-1.5))) * (math.e - 1)))),
        # The rejected answers' mean ratio, -2, is no divergence and taken as 0; the chosen answers' is 1.
        ("kto", 0.5 * (1 - 1 / (1 + math.exp(-0.1))) + 0.5 * (1 - 1 / (1 + math.exp(-0.3)))),
    ],
)
def test_values_that_are_worked_out_by_hand(loss, value):
    """Answers of two tokens, log pi = -2 and -3, log ref = -3 and -1."""
    tokens = np.zeros((2, 2), np.int32)
    pairs = Pairs(tokens, tokens, np.ones((2, 2), np.float32), np.array([-3, -1], np.float32))
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, -2.0]])
    total, measures = computed(PreferenceConfig(loss=loss), logprobs, pairs)
    assert float(total) == pytest.approx(value, rel=1e-6)
    assert float(measures["accuracy"]) == 1.0
    if PreferenceConfig(loss=loss).needs_reference:
        assert float(measures["kl"]) == pytest.approx((1 - 2) / 2)
    if loss == "dpo":
        rewards = [float(measures[name]) for name in ("reward_chosen", "reward_rejected", "margin")]
        assert rewards == pytest.approx([0.1, -0.2, 0.3])


def test_a_policy_that_is_its_reference_has_a_dpo_loss_of_ln_2_and_no_divergence():
    step = make_step(loss=PreferenceLoss(PreferenceConfig()))
    pairs = make_pairs(5, padding=1)
    pairs.reference = step.answer_logprobs(pairs)
    assert pairs.reference.dtype == np.float32
    total = step.evaluate(pairs)
    assert total.weight == 5
    assert total.loss / total.weight == pytest.approx(math.log(2), rel=1e-7)
    assert total.means() == {"reward_chosen": 0, "reward_rejected": 0, "margin": 0, "accuracy": 0, "kl": 0}
    first = step.train([pairs], schedule=SCHEDULE)
    assert first.loss == pytest.approx(math.log(2), rel=1e-7)
    assert step.evaluate(pairs).loss < total.loss


@pytest.mark.parametrize("config", [c for c in ALL if c.loss != "kto"], ids=lambda c: c.loss)
@pytest.mark.parametrize("rows", [2, 4, 6])
def test_any_split_of_the_pairs_makes_the_same_update_and_measures(config, rows):
    pairs = make_pairs(11, padding=1)
    whole, parts = (make_step(grad_clip=0.0, loss=PreferenceLoss(config)) for _ in range(2))
    one = whole.train([pairs], schedule=SCHEDULE)
    many = parts.train([pairs.part(slice(i, i + rows)) for i in range(0, 24, rows)], schedule=SCHEDULE)
    assert many.weight == one.weight == 11
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.measures == pytest.approx(one.measures, rel=1e-5, abs=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_training_makes_the_chosen_answers_likelier_than_the_rejected(config):
    step = make_step(loss=PreferenceLoss(config))
    pairs = make_pairs(6)
    pairs.reference = step.answer_logprobs(pairs)
    before = step.evaluate(pairs)
    for _ in range(30):
        metrics = step.train([pairs], schedule=SCHEDULE)
    assert metrics.loss < before.loss / before.weight
    assert step.evaluate(pairs).means()["accuracy"] == 1


def test_certain_answers_and_hopeless_ones_have_finite_losses_and_gradients():
    for config in ALL:
        pairs = make_pairs(2)
        for value in (0.0, -1e-9, -1e4):
            logprobs = torch.full(pairs.weights.shape, value, requires_grad=True)
            loss, _ = computed(config, logprobs, pairs)
            loss.backward()
            assert torch.isfinite(loss), (config, value)
            assert torch.isfinite(logprobs.grad).all(), (config, value)


def test_the_points_of_reference_of_kto_are_never_negative_and_count_no_padding():
    ratios, counted = torch.tensor([4.0, -2.0, 99.0], requires_grad=True), torch.tensor([1.0, 1.0, 0.0])
    assert losses.kto_kl(ratios, counted) == 1
    assert losses.kto_kl(-ratios, counted) == 0
    assert not losses.kto_kl(ratios, counted).requires_grad


def test_a_batch_without_the_reference_that_the_loss_needs_is_refused_before_the_model_works():
    pairs = make_pairs(2)
    pairs.reference = None
    step = make_step(loss=PreferenceLoss(PreferenceConfig(loss="kto")))
    with pytest.raises(ValueError, match=r"preference.loss is kto, but the batch has no reference.*compute them first"):
        step.evaluate(pairs)
    assert make_step(loss=PreferenceLoss(PreferenceConfig(loss="simpo"))).evaluate(pairs).weight == 2
    with pytest.raises(ValueError, match=r"3 rows; expected pairs"):
        PreferenceLoss(PreferenceConfig()).weight(pairs.part(slice(0, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dop"}, r"preference.loss is 'dop'; expected one of dpo, ipo, simpo, orpo, kto"),
        ({"beta": 0.0}, "preference.beta is 0.0"),
        ({"beta": math.nan}, "preference.beta is nan"),
        ({"label_smoothing": 0.5}, "preference.label_smoothing is 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "preference.label_smoothing is 0.1, which ipo does not have"),
        ({"loss": "simpo", "gamma": -1.0}, "preference.gamma is -1.0"),
        ({"beta": 1e39}, r"preference.beta is 1e\+39; expected a positive number that float32 can hold"),
        ({"loss": "simpo", "gamma": 1e300}, r"preference.gamma is 1e\+300; .* that float32 can hold"),
        ({"loss": "simpo", "length_normalization": False}, "preference.length_normalization is False, but simpo"),
        ({"loss": "kto", "length_normalization": True}, "preference.length_normalization is True, but kto"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**settings)


class Buckets:
    """Batches whose shapes change: sample i has 1 to 3 pairs of 3 to 5 tokens."""

    num_windows, num_tokens, num_bytes = 4, 60, 120

    def __init__(self, reference=None) -> None:
        self.reference, self.consumed = reference, []

    def sample(self, number: int) -> Pairs:
        pairs = make_pairs(1 + number % 3, length=3 + number % 2 * 2, seed=number % 10)
        pairs.reference = self.reference(pairs) if self.reference else None
        return pairs

    def batch(self, first_sample: int, count: int) -> Pairs:
        assert count == 1
        self.consumed.append(first_sample)
        return self.sample(first_sample)

    def position(self, sample: int) -> dict[str, int]:
        return {"epoch": sample // 10, "cursor": sample % 10}

    def state(self, first_sample: int, count: int):
        return "ready"

    def batches(self, batch_size: int, *, max_windows: int | None = None):
        assert batch_size == 1
        for number in range(min(self.num_windows, max_windows or self.num_windows)):
            yield self.sample(number)


def tune(make_loop, directory, *, steps: int, **settings):
    """A loop of preference steps of two batches, from the same first policy, which is the reference."""
    torch.manual_seed(0)
    step = make_step(Bigram(), loss=PreferenceLoss(PreferenceConfig()))
    torch.manual_seed(0)
    reference = make_step(Bigram())
    run = make_loop(directory, step=step, steps=steps, micro_batch=4, **settings)
    run.loop.samples_per_step = 2
    run.loop.batches = run.loop.validation = Buckets(reference.answer_logprobs)
    run.loop.__post_init__()
    return run


def test_a_run_over_batches_of_changing_shape_reports_the_stage_instead_of_bits_per_byte(make_loop, tmp_path):
    run = tune(make_loop, tmp_path / "run", steps=12, log_every=2)
    result = run.loop.run()
    assert run.loop.batches.consumed == list(range(24))
    sizes = [run.loop.batches.sample(i).tokens.size for i in range(24)]
    assert result.tokens == sum(sizes)
    first, *_, last = run.sink.of("train")
    assert {"reward_chosen", "reward_rejected", "margin", "accuracy", "kl", "loss", "grad_norm"} <= first.keys()
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"]
    validation = run.sink.of("validation")[-1]
    assert "bits_per_byte" not in validation
    assert result.bits_per_byte is None
    assert result.validation_measures["accuracy"] == validation["accuracy"]
    assert run.store.read_state(result.checkpoint)["validation_measures"] == result.validation_measures
    assert run.store.read_state(result.checkpoint)["samples"] == 24


def test_an_interrupted_run_of_preferences_is_bitwise_the_uninterrupted_one(make_loop, tmp_path):
    whole = tune(make_loop, tmp_path / "whole", steps=9)
    whole.loop.run()
    first = tune(make_loop, tmp_path / "parts", steps=9, checkpoint_every=5)
    run_until(first.loop, 6)
    second = tune(make_loop, tmp_path / "parts", steps=9)
    second.loop.resume(second.store.latest_valid())
    assert second.loop.progress.result.step == 5
    second.loop.run()
    pairs = zip(whole.loop.step.model.parameters(), second.loop.step.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert second.stopping.state_dict() == whole.stopping.state_dict()


def test_a_limited_evaluation_reads_about_so_many_counted_tokens(make_loop, tmp_path):
    run = tune(make_loop, tmp_path / "run", steps=1, eval_every=1, eval_tokens=30)
    run.loop.run()
    limited, whole = run.sink.of("validation")
    step = make_step(Bigram(), loss=PreferenceLoss(PreferenceConfig()))
    step.load(run.store.latest_valid())
    samples = [step.evaluate(run.loop.batches.sample(i)) for i in range(4)]
    for record, count in ((limited, 2), (whole, 4)):
        total = sum(s.loss for s in samples[:count]) / sum(s.weight for s in samples[:count])
        assert record["loss"] == pytest.approx(total, rel=1e-6)


def test_samples_per_step_must_be_positive(make_loop, tmp_path):
    run = make_loop(tmp_path / "run")
    run.loop.samples_per_step = 0
    with pytest.raises(ValueError, match="samples_per_step is 0"):
        run.loop.__post_init__()
