"""Where numbers that are not finite come from: found by doing the step again, without any trace in what is trained."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anarcho_train import StepMetrics, StepSchedule
from anarcho_train.anomalies import AnomalyDetection, NonFiniteNumbers

from .conftest import Bigram, CountingText, make_step

SCHEDULE = StepSchedule(lr_scale=1.0, number=6)


def batches() -> list:
    text = CountingText()
    return [text.rows(range(i, i + 4)) for i in (0, 4)]


class Overflowing(Bigram):
    """A hidden layer whose output is infinite for one token."""

    def token_logprobs(self, tokens, targets, **_):
        self.hidden.bias.data[:] = 0
        x = self.embedding(tokens)
        x = torch.where((tokens == 5)[..., None], x * 1e38 * 1e10, x)
        logits = self.head(self.hidden(x).tanh())
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


class Rooted(Bigram):
    """The square root of zero, whose value is finite and whose gradient is not."""

    def token_logprobs(self, tokens, targets, **_):
        x = self.hidden(self.embedding(tokens))
        wrong = torch.sqrt((x - x.detach()) ** 2)
        logits = self.head((wrong * 0 + x).tanh())
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def explain(model: torch.nn.Module) -> str:
    with pytest.raises(NonFiniteNumbers) as error:
        AnomalyDetection(make_step(model)).train(batches(), schedule=SCHEDULE)
    assert str(error.value).startswith("step 7 has loss ")
    return str(error.value)


def test_the_first_module_with_an_output_that_is_not_finite_is_named():
    torch.manual_seed(0)
    assert "the output of hidden (Linear) in the forward pass" in explain(Overflowing())


def test_the_function_of_the_backward_pass_is_named_with_the_line_of_its_forward():
    torch.manual_seed(0)
    message = explain(Rooted())
    assert "the gradient of SqrtBackward0 in the backward pass" in message
    assert "`wrong = torch.sqrt((x - x.detach()) ** 2)`" in message
    assert "test_train_anomalies.py, line" in message


def test_weights_that_are_not_finite_themselves_are_named_first():
    model = Bigram()
    with torch.no_grad():
        model.hidden.weight[1, 2] = math.nan
    assert "the weights hidden.weight are not finite themselves (1 of 64)" in explain(model)


def test_an_infinite_gradient_is_named_with_its_parameter():
    model = Bigram()
    model.hidden.bias.register_hook(lambda gradient: gradient * math.inf)
    assert "the gradient of the parameter hidden.bias" in explain(model)


def test_looking_leaves_no_trace_and_sound_steps_are_as_without():
    watched, plain = AnomalyDetection(make_step()), make_step()
    for _ in range(2):
        assert watched.train(batches(), schedule=SCHEDULE) == plain.train(batches(), schedule=SCHEDULE)
        assert watched.explain(batches(), schedule=SCHEDULE) is None
    parameters = zip(watched.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)
    assert not torch.is_anomaly_enabled()
    assert not watched.model.hidden._forward_hooks
    assert watched.evaluate(batches()[0]) == plain.evaluate(batches()[0])


class Fixed:
    """A step that reports what it is told to."""

    def __init__(self, *, precision: str, loss: float, grad_norm: float) -> None:
        self.precision = precision
        self.metrics = StepMetrics(loss=loss, weight=1.0, grad_norm=grad_norm, skipped=True)

    def train(self, micro_batches, *, schedule):
        return self.metrics

    def explain(self, micro_batches, *, schedule):
        return None


def test_an_overflow_of_float16s_scaled_gradient_is_no_fault_but_its_loss_is():
    step = Fixed(precision="torch.float16", loss=1.0, grad_norm=math.inf)
    assert AnomalyDetection(step).train([], schedule=SCHEDULE) is step.metrics
    for other in (
        Fixed(precision="mlx.core.float16", loss=math.nan, grad_norm=1.0),
        Fixed(precision="torch.bfloat16", loss=1.0, grad_norm=math.inf),
    ):
        with pytest.raises(NonFiniteNumbers, match="done again all its numbers were finite"):
            AnomalyDetection(other).train([], schedule=SCHEDULE)


def test_a_step_that_was_left_out_for_its_spike_is_none_of_its_business():
    step = Fixed(precision="float32", loss=99.0, grad_norm=1.0)
    assert AnomalyDetection(step).train([], schedule=SCHEDULE).skipped


def test_the_run_ends_at_the_step_and_keeps_its_checkpoints(make_loop):
    step = make_step()
    run = make_loop(step=AnomalyDetection(step), checkpoint_every=2)
    inner = run.text.batch

    def batch(first, count):
        rows = inner(first, count)
        if first >= 5 * 8:
            rows.weights[0, 0] = math.nan
        return rows

    run.loop.batches = SimpleNamespace(batch=batch, state=run.text.state, position=run.text.position)
    with pytest.raises(
        NonFiniteNumbers, match=r"has loss nan .* the batch itself is not finite: its weights \(1 of 16"
    ):
        run.loop.run()
    assert run.store.latest_valid().name == "step-00000004"


def test_mlx_names_the_first_parameter_whose_gradient_or_weights_are_not_finite():
    pytest.importorskip("mlx.core")
    import mlx.core as mx

    from . import mlx_bigram

    step = mlx_bigram.make_step()
    sound = mlx_bigram.flat(step.model.parameters())
    watched = AnomalyDetection(step)
    assert not watched.train(batches(), schedule=SCHEDULE).skipped
    assert step.explain(batches(), schedule=SCHEDULE) is None
    faulty = batches()
    faulty[1].weights[0, 0] = math.nan
    with pytest.raises(NonFiniteNumbers, match=r"parameter whose gradient is not finite is embedding\.weight"):
        watched.train(faulty, schedule=SCHEDULE)
    step.model.head.weight = mx.array(np.full((13, 8), np.nan, np.float32))
    with pytest.raises(NonFiniteNumbers, match=r"the weights head.weight \(104 of 104 numbers\) are not finite"):
        watched.train(batches(), schedule=SCHEDULE)
    assert sound.keys() == mlx_bigram.flat(step.model.parameters()).keys()
