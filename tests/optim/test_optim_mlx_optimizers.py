"""The classes of `anarcho_optim.mlx`: groups, gradients and options of all kinds; bad input is named."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

import cases
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from anarcho_optim import OptimConfig
from anarcho_optim.mlx import Muon, MuonAdamW, param_groups
from mlx.utils import tree_unflatten
from mlx_toy import flat, loss, same, tiny_model, tokens, train


def test_a_group_reads_and_writes_the_rates_in_the_state():
    optimizer = MuonAdamW(param_groups(tiny_model()))
    group = optimizer.param_groups[0]
    assert group["name"] == "matrices"
    assert group["params"][0] == "layers.0.up.weight"
    group["lr"] = 0.01
    assert isinstance(group["lr"], float)
    assert optimizer.state["hyperparameters"]["matrices"]["lr"].item() == pytest.approx(0.01)
    assert group.setdefault("initial_lr", 0.5) == 0.5
    assert dict(group)["initial_lr"] == 0.5
    optimizer.learning_rate = 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert optimizer.learning_rate.item() == 0.25


@pytest.mark.parametrize(("key", "value"), [("lr", -1.0), ("lr", float("nan")), ("momentum", 1.0), ("nesterov", False)])
def test_a_group_refuses_a_bad_rate_and_a_change_that_compiled_steps_would_not_see(key, value):
    group = MuonAdamW(param_groups(tiny_model())).param_groups[0]
    before = dict(group)
    with pytest.raises(ValueError, match=key):
        group[key] = value
    assert dict(group) == before


def test_parameters_without_a_gradient_are_left_alone():
    model = tiny_model()
    optimizer = MuonAdamW(param_groups(model, config=OptimConfig(adamw_weight_decay=0.5)))
    before, state = flat(model.parameters()), flat(optimizer.state)
    gradients = {"layers": [{}, {"up": {"weight": mx.ones((24, 8))}}]}
    optimizer.update(model, gradients)
    moved = {name for name, value in flat(model.parameters()).items() if not mx.array_equal(value, before[name])}
    assert moved == {"layers.1.up.weight"}
    touched = {name for name, value in flat(optimizer.state).items() if not mx.array_equal(value, state[name])}
    assert touched == {"layers.1.up.weight.momentum", "step"}
    assert optimizer.apply_gradients({}, model) == {}


def test_the_returned_tree_is_like_the_gradients_though_the_parameters_are_more():
    weights = {"a": mx.zeros((2, 3)), "b": [mx.zeros(2), {"c": mx.zeros((3, 2))}]}
    groups = [
        {"name": "m", "params": [("a", weights["a"]), ("b.1.c", weights["b"][1]["c"])], **cases.muon()},
        {"name": "v", "params": [("b.0", weights["b"][0])], **cases.adamw()},
    ]
    result = MuonAdamW(groups).apply_gradients({"b": [mx.ones(2), {"c": mx.ones((3, 2))}]}, weights)
    assert isinstance(result["b"], list)
    assert {name: value.shape for name, value in flat(result).items()} == {"b.0": (2,), "b.1.c": (3, 2)}


WEIGHT = mx.zeros((4, 6))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"params": [("w", WEIGHT)]}], "group 'group 0' has algorithm None"),
        ([{"params": [("w", WEIGHT)], "algorithm": "sgd"}], "algorithm 'sgd'"),
        ([{"params": [("w", WEIGHT), ("w", WEIGHT)], "algorithm": "muon"}], "parameter w is in group 'group 0'"),
        ([{"params": [("w", WEIGHT)], "algorithm": "muon"}, {"params": [("w", WEIGHT)], "algorithm": "adamw"}], "parameter w"),
        ([{"name": "a", "params": [], "algorithm": "muon"}, {"name": "a", "params": [], "algorithm": "muon"}], "called 'a'"),
        ([{"params": [("w", mx.zeros(3))], "algorithm": "muon"}], r"parameter w has shape \(3,\)"),
        ([{"params": [("w", mx.zeros((3, 2, 2)))], "algorithm": "muon"}], "parameter w .* flatten=True"),
        ([{"params": [("w", mx.zeros((3, 2), mx.int32))], "algorithm": "muon"}], "parameter w has dtype"),
        ([{"params": [("w", mx.zeros(2, mx.complex64))], "algorithm": "adamw"}], "parameter w has dtype"),
        ([{"params": [("w", WEIGHT)], "algorithm": "muon", "split_sizes": (1, 2)}], "parameter w .* split_sizes"),
        ([{"params": [("w", WEIGHT)], "algorithm": "muon", "lr": -1.0}], "lr -1.0"),
        ([{"params": [("step", WEIGHT)], "algorithm": "muon"}], "called step"),
    ],
)  # fmt: skip
def test_bad_groups_are_refused_by_name(groups, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(groups)


def test_gradients_of_another_model_are_refused_by_name():
    optimizer = MuonAdamW([{"params": [("w", WEIGHT)], "algorithm": "muon"}])
    with pytest.raises(ValueError, match="gradient for v"):
        optimizer.apply_gradients({"v": WEIGHT}, {"w": WEIGHT, "v": WEIGHT})
    with pytest.raises(ValueError, match="gradient for w"):
        optimizer.apply_gradients({"w": WEIGHT}, {"v": WEIGHT})
    with pytest.raises(ValueError, match=r"gradient of w has shape \(6, 4\)"):
        optimizer.apply_gradients({"w": WEIGHT.T}, {"w": WEIGHT})
    with pytest.raises(ValueError, match="parameter v is in no group"):
        optimizer.init({"v": WEIGHT})


def test_muon_alone_equals_a_muon_group():
    weight, gradient = mx.random.normal((4, 6)), mx.random.normal((4, 6))
    alone = Muon(0.05, nesterov=False, normuon=True, split_sizes=(2, 2))
    options = cases.muon(nesterov=False, normuon=True, split_sizes=(2, 2))
    grouped = MuonAdamW([{"params": [("w", weight)], **options}])
    for _ in range(2):
        first = alone.apply_gradients({"w": gradient}, {"w": weight})
        assert same(first, grouped.apply_gradients({"w": gradient}, {"w": weight}))
        weight = first["w"]
    assert same(alone.state["w"], grouped.state["w"])


def muon_and_adamw(learning_rate, *, momentum=0.95) -> mlx.optimizers.MultiOptimizer:
    muon = Muon(learning_rate, momentum)
    adamw = mlx.optimizers.AdamW(learning_rate)
    return mlx.optimizers.MultiOptimizer([muon, adamw], [lambda name, weight: "layers" in name and weight.ndim == 2])


def test_muon_works_in_a_multi_optimizer_with_schedules_in_one_compiled_trace():
    model, traces = tiny_model(), 0
    schedule = mlx.optimizers.linear_schedule(0.02, 0.01, 10)
    optimizer = muon_and_adamw(schedule, momentum=mlx.optimizers.linear_schedule(0.85, 0.95, 10))
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(batch: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        value, gradients = nn.value_and_grad(model, loss)(model, batch)
        optimizer.update(model, gradients)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [compiled(tokens(0)).item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert traces == 1
    muon = optimizer.optimizers[0]
    assert muon.learning_rate.item() == pytest.approx(0.01)
    assert muon.state["momentum"].item() == pytest.approx(0.95)
    assert "layers.1.down.weight.momentum" in flat(muon.state)
    assert not any(name.startswith(("norm", "embedding")) for name in flat(muon.state))


def test_the_state_of_muon_comes_back_from_a_file_before_the_first_step(tmp_path):
    model, again = tiny_model(), tiny_model()
    optimizer, resumed = muon_and_adamw(0.01), muon_and_adamw(0.01)
    train(model, optimizer, range(2))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), flat(optimizer.state))
    model.save_weights(str(tmp_path / "model.safetensors"))
    again.load_weights(str(tmp_path / "model.safetensors"))
    resumed.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    train(model, optimizer, range(2, 4))
    train(again, resumed, range(2, 4))
    assert same(again.parameters(), model.parameters())


def test_muon_refuses_vectors_by_name_and_bad_options_and_the_state_of_another_model():
    with pytest.raises(ValueError, match=r"parameter norm\.weight has shape"):
        Muon(0.1).init({"norm": {"weight": mx.zeros(3)}})
    with pytest.raises(ValueError, match="parameter w has shape"):
        Muon(0.1).apply_gradients({"w": mx.zeros(3)}, {"w": mx.zeros(3)})
    with pytest.raises(TypeError, match="no option 'lr'"):
        Muon(0.1, lr=0.1)
    with pytest.raises(ValueError, match="lr -1"):
        Muon(-1.0)
    with pytest.raises(ValueError, match="called momentum"):
        Muon(0.1).init({"momentum": mx.zeros((3, 3))})
    optimizer = Muon(0.1)
    optimizer.state = {"w": {"momentum": mx.zeros((2, 2))}, **optimizer.state}
    with pytest.raises(ValueError, match=r"w.momentum has shape \(2, 2\) in the state"):
        optimizer.init({"w": mx.zeros((3, 3))})


def test_muon_takes_the_arguments_of_mlx_in_their_order():
    optimizer = Muon(mx.array(0.1), 0.9, 0.2, False, 3)
    assert optimizer.state["momentum"].item() == pytest.approx(0.9)
    assert optimizer.state["weight_decay"].item() == pytest.approx(0.2)
    optimizer.learning_rate = 0.5
    assert optimizer.learning_rate.item() == 0.5
