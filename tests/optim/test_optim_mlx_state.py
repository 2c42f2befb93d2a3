"""The state of `anarcho_optim.mlx` survives files, and compiled steps see what schedules and files put into it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from anarcho_optim import OptimConfig
from anarcho_optim.mlx import MuonAdamW, param_groups
from mlx.utils import tree_unflatten
from mlx_toy import flat, loss, same, tiny_model, tokens, train

CONFIG = OptimConfig(normuon=True, weight_decay=0.1)


def test_training_lowers_the_loss_and_tied_heads_need_nothing():
    model = tiny_model()
    before = loss(model, tokens(0)).item()
    train(model, MuonAdamW(param_groups(model, config=OptimConfig(lr=0.02))), [0] * 20)
    assert loss(model, tokens(0)).item() < 0.7 * before


def test_the_state_exists_from_the_start_under_the_canonical_names_and_holds_arrays_only():
    state = flat(MuonAdamW(param_groups(tiny_model(), config=CONFIG)).state)
    assert state["layers.0.up.weight.momentum"].shape == (24, 8)
    assert state["layers.0.up.weight.neuron_mean_sq"].shape == (24, 1)
    assert state["embedding.weight.exp_avg"].shape == state["embedding.weight.exp_avg_sq"].shape == (20, 8)
    assert state["norm.weight.step"].shape == ()
    assert state["norm.weight.step"].dtype == mx.float32
    assert state["hyperparameters.gains and biases.lr"].shape == ()
    assert all(isinstance(value, mx.array) for value in state.values())


@pytest.mark.parametrize("as_tree", [False, True])
def test_a_saved_state_comes_back_bit_for_bit_and_training_goes_on_as_if_never_stopped(tmp_path, as_tree):
    model = tiny_model()
    optimizer = MuonAdamW(param_groups(model, config=CONFIG))
    optimizer.param_groups[0]["lr"] = 0.003
    train(model, optimizer, range(3))
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), flat(optimizer.state))
    model.save_weights(str(tmp_path / "model.safetensors"))

    again = tiny_model()
    again.load_weights(str(tmp_path / "model.safetensors"))
    resumed = MuonAdamW(param_groups(again, config=CONFIG))
    saved = mx.load(str(tmp_path / "optimizer.safetensors"))
    resumed.load_state_dict(tree_unflatten(list(saved.items())) if as_tree else saved)
    assert same(resumed.state, optimizer.state)
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert same(again.parameters(), model.parameters())
    assert same(resumed.state, optimizer.state)


def test_a_state_without_rates_keeps_those_of_the_optimizer():
    model = tiny_model()
    optimizer = MuonAdamW(param_groups(model))
    train(model, optimizer, range(2))
    moments = {k: np.array(v) for k, v in flat(optimizer.state).items() if k != "step" and "hyperparameters" not in k}
    other = MuonAdamW(param_groups(model, config=OptimConfig(lr=0.5)))
    other.load_state_dict(moments)
    assert other.param_groups[0]["lr"] == 0.5
    assert same(other.state["norm.weight"], optimizer.state["norm.weight"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("norm.weight.exp_avg", lambda state, name: state.pop(name), "lacks norm.weight.exp_avg"),
        ("other.weight.momentum", lambda state, name: state.update({name: mx.zeros(2)}), "has other.weight.momentum"),
        ("norm.weight.exp_avg", lambda state, name: state.update({name: mx.zeros(3)}), r"norm.weight.exp_avg has shape \(3,\)"),
    ],
)  # fmt: skip
def test_the_state_of_another_model_is_refused_by_name_and_changes_nothing(name, change, message):
    model = tiny_model()
    optimizer = MuonAdamW(param_groups(model))
    state = {key: value + 1 for key, value in flat(optimizer.state).items()}
    before = flat(optimizer.state)
    change(state, name)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(optimizer.state, tree_unflatten(list(before.items())))


@pytest.mark.parametrize("config", [OptimConfig(), CONFIG, OptimConfig(cautious_weight_decay=True, nesterov=False)])
def test_a_compiled_step_is_traced_once_over_a_schedule_and_equals_the_plain_one(config):
    traces = 0
    compiled_model, plain_model = tiny_model(), tiny_model()
    compiled_optimizer = MuonAdamW(param_groups(compiled_model, config=config))
    plain_optimizer = MuonAdamW(param_groups(plain_model, config=config))
    state = [compiled_model.state, compiled_optimizer.state]

    def step(batch: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        value, gradients = nn.value_and_grad(compiled_model, loss)(compiled_model, batch)
        compiled_optimizer.update(compiled_model, gradients)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    for index in range(20):
        for optimizer in (compiled_optimizer, plain_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = 0.002 * (1 - index / 20)
                group["weight_decay"] = 0.1 * index / 20
            optimizer.param_groups[0]["momentum"] = 0.85 + 0.1 * index / 20
        mx.eval(compiled(tokens(index)), state)
        train(plain_model, plain_optimizer, range(index, index + 1))
    assert traces == 1
    weights = flat(plain_model.parameters())
    for name, weight in flat(compiled_model.parameters()).items():
        assert mx.allclose(weight, weights[name], rtol=1e-3, atol=1e-5), name


def test_a_compiled_step_sees_a_state_that_is_loaded_after_it_was_compiled():
    model = tiny_model()
    optimizer = MuonAdamW(param_groups(model))
    gradients = nn.value_and_grad(model, loss)(model, tokens(0))[1]
    step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    start = {name: value + 0 for name, value in flat(optimizer.state).items()}
    first = step(gradients, model.parameters())
    mx.eval(first, optimizer.state)
    optimizer.state = tree_unflatten(list(start.items()))
    assert same(step(gradients, model.parameters()), first)


def test_importing_the_package_and_its_settings_loads_no_framework():
    modules = "anarcho_optim.groups, anarcho_optim.scaling, anarcho_optim.memory"
    code = f"import sys, anarcho_optim, {modules}; print('torch' in sys.modules, 'mlx' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "False"]


def test_importing_the_mlx_half_does_not_load_torch():
    code = "import sys, anarcho_optim.mlx; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
