"""A run that is saved, restored and continued is the run that was never interrupted, to the last bit, at every step."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from anarcho_optim.torch import Muon  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch_toy import toy, toy_loss, toy_optimizer, train, weights_of  # noqa: E402

STEPS = 6
OVERFLOW = 2
"""The step whose gradients are infinite, which the scaler skips."""

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=STEPS + 1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.7)], milestones=[2]
    ),
}


class Run:
    """Model, optimizer, scheduler and scaler, all with state."""

    def __init__(self, scheduler: str, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.model = toy(seed).to(dtype)
        self.optimizer = toy_optimizer(self.model, normuon=True, cautious_weight_decay=True)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss = toy_loss(self.model, step)
        self.scaler.scale(loss * float("inf") if step == OVERFLOW else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    def everything(self) -> dict[str, Tensor]:
        """Every tensor of the run by name."""
        tensors = dict(self.model.named_parameters())
        names = {p: name for name, p in tensors.items()}
        for p, state in self.optimizer.state.items():
            tensors |= {f"{names[p]}.{key}": value for key, value in state.items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def through_torch_save(run: Run) -> Callable[[Run], None]:
    parts = {key: vars(run)[key].state_dict() for key in ("model", "optimizer", "scaler")}
    file = io.BytesIO()
    torch.save(parts, file)
    scheduler = json.dumps(run.scheduler.state_dict())

    def restore(other: Run) -> None:
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for key, state in loaded.items():
            vars(other)[key].load_state_dict(state)
        other.scheduler.load_state_dict(json.loads(scheduler))

    return restore


def through_safetensors(run: Run) -> Callable[[Run], None]:
    """Nothing but tensors named ``<parameter>.<state>`` and JSON."""
    packed = run.optimizer.state_dict()
    names = [name for group in packed["param_groups"] for name in group["param_names"]]
    tensors = {f"{names[i]}.{key}": value for i, state in packed["state"].items() for key, value in state.items()}
    weights = {f"weights.{name}": p.detach() for name, p in run.model.named_parameters()}
    file = safetensors.save(tensors | weights)
    rest = json.dumps([packed["param_groups"], run.scheduler.state_dict(), run.scaler.state_dict()])

    def restore(other: Run) -> None:
        loaded = safetensors.load(file)
        param_groups, scheduler, scaler = json.loads(rest)
        state: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(names))}
        for full_name in loaded.keys() & tensors.keys():
            name, _, key = full_name.rpartition(".")
            state[names.index(name)][key] = loaded[full_name]
        other.optimizer.load_state_dict({"state": state, "param_groups": param_groups})
        weights = {n.removeprefix("weights."): t for n, t in loaded.items() if n.startswith("weights.")}
        other.model.load_state_dict(weights, strict=False)  # The head is tied to the embedding.
        other.scheduler.load_state_dict(scheduler)
        other.scaler.load_state_dict(scaler)

    return restore


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype and torch.equal(a, theirs[name]) for name, a in ours.items()
    )


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # SequentialLR's own.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_run_resumes_bit_for_bit_at_every_step(scheduler, save, dtype):
    uninterrupted = Run(scheduler, seed=0, dtype=dtype)
    saved = []
    for step in range(STEPS):
        saved.append(save(uninterrupted))
        uninterrupted.step(step)
    assert not equal(Run(scheduler, seed=0, dtype=dtype).everything(), uninterrupted.everything())
    for start, restore in enumerate(saved):
        resumed = Run(scheduler, seed=1, dtype=dtype)
        restore(resumed)
        for step in range(start, STEPS):
            resumed.step(step)
        assert equal(resumed.everything(), uninterrupted.everything()), start
        assert resumed.optimizer.state_dict()["param_groups"][0]["lr"] == uninterrupted.optimizer.param_groups[0]["lr"]


def test_the_state_is_tensors_only_and_the_groups_are_json():
    run = Run("OneCycleLR", seed=0)
    run.step(0)
    packed = run.optimizer.state_dict()
    assert all(isinstance(value, Tensor) for state in packed["state"].values() for value in state.values())
    assert packed["param_groups"] == json.loads(json.dumps(packed["param_groups"]), object_hook=_tuples)


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists back as the tuples of a group."""
    return {k: tuple(v) if isinstance(v, list) and k not in ("params", "param_names") else v for k, v in group.items()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_or_pickled_optimizer_goes_on_by_itself(copied):
    model = toy()
    optimizer = toy_optimizer(model, normuon=True)
    train(model, optimizer, range(2))
    before = weights_of(model)
    twin, twin_optimizer = copied((model, optimizer))
    train(twin, twin_optimizer, range(2, 5))
    assert equal(weights_of(model), before)
    train(model, optimizer, range(2, 5))
    assert equal(weights_of(model), weights_of(twin))
    twin_optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2, 2)))], "algorithm": "muon"})


def test_a_loaded_state_shares_no_memory_with_its_source():
    model = toy()
    optimizer = toy_optimizer(model)
    train(model, optimizer, range(2))
    other = toy_optimizer(toy(1))
    other.load_state_dict(optimizer.state_dict())
    ours = {t.data_ptr() for state in optimizer.state.values() for t in state.values()}
    assert not ours & {t.data_ptr() for state in other.state.values() for t in state.values()}


def test_a_hook_may_adapt_a_saved_state_before_it_is_checked():
    model = toy()
    optimizer = toy_optimizer(model)
    train(model, optimizer, range(2))
    packed = copy.deepcopy(optimizer.state_dict())
    for group in packed["param_groups"]:
        group["param_names"] = [f"decoder.{name}" for name in group["param_names"]]
    other = toy_optimizer(toy(1))

    def rename(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [
            g | {"param_names": [n.removeprefix("decoder.") for n in g["param_names"]]}
            for g in state_dict["param_groups"]
        ]
        return state_dict | {"param_groups": groups}

    with pytest.raises(ValueError, match=r"it holds decoder\..* where .* is expected"):
        other.load_state_dict(packed)
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(packed)
    assert other.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


def test_a_state_saved_from_a_compiled_model_is_one_of_the_plain_model():
    model = toy()
    compiled = torch.compile(model, backend="eager")
    plain, of_compiled = toy_optimizer(model), toy_optimizer(compiled)
    assert plain.param_groups == of_compiled.param_groups
    named = Muon([(f"_orig_mod.{n}", p) for n, p in model.named_parameters() if p.ndim == 2])
    Muon([(n, p) for n, p in model.named_parameters() if p.ndim == 2]).load_state_dict(named.state_dict())


def test_parameters_without_names_are_matched_by_their_order():
    def optimizer(seed: int) -> Muon:
        model = toy(seed)
        return Muon([model.first.weight, model.second.weight])

    source, target = optimizer(0), optimizer(1)
    for p in source.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    source.step()
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(source.state.values(), target.state.values(), strict=True):
        assert torch.equal(ours["momentum"], theirs["momentum"])
