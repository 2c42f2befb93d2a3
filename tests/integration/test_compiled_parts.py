"""A model that is compiled in parts is the model that is not compiled, and its blocks are compiled once for all."""

from __future__ import annotations

import copy

import pytest
import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from torch._dynamo.utils import counters

MODEL = ModelConfig(vocab_size=300, context_length=64, num_layers=2, dim=64, num_heads=4, hidden_dim=128)


def make() -> GPT:
    model = GPT(MODEL)
    model.init_weights(seed=0)
    model.gradient_checkpointing = True
    return model


def loss_and_gradients(model: GPT, *, rows: int = 4) -> list[torch.Tensor]:
    ids = torch.randint(0, 300, (rows, 64), generator=torch.Generator().manual_seed(rows))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = -model.token_logprobs(ids, ids).mean()
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_gradients_are_those_of_the_model_and_both_blocks_need_one_graph():
    plain, model = make(), make()
    model.compile_parts("aot_eager")
    for weight in model.product_weights():
        weight.grad_dtype = torch.bfloat16
    for ours, theirs in zip(loss_and_gradients(model), loss_and_gradients(plain), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=1e-4)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2, "one for all blocks, one for the log-probabilities"
    loss_and_gradients(model)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_a_copy_is_not_bound_to_its_model_and_compilation_can_be_taken_back():
    model = make()
    model.compile_parts("aot_eager")
    before = loss_and_gradients(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.norm.weight.zero_()
    assert loss_and_gradients(copied)[0] != before[0]
    model.compile_parts(None)
    assert model.compiled_parts is None
    counted = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(loss_and_gradients(model, rows=3)[0], loss_and_gradients(make(), rows=3)[0])
    assert counters["stats"]["unique_graphs"] == counted
