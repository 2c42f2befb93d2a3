"""What cannot be optimised is refused before anything is changed, in a sentence that names the parameter or the option."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anarcho_optim.torch import MuonAdamW, param_groups  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch_toy import toy, toy_optimizer, train, weights_of  # noqa: E402


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (4, 6)))


def group(*members: Any, **options: Any) -> dict[str, Any]:
    return {"params": [(f"layers.{i}.weight", p) for i, p in enumerate(members)], "algorithm": "muon"} | options


SHARED = matrix()
INTEGERS = nn.Parameter(torch.zeros(4, 6, dtype=torch.int64), requires_grad=False)
COMPLEX = nn.Parameter(torch.zeros(4, 6, dtype=torch.complex64))
SPARSE = nn.Parameter(torch.eye(4).to_sparse())
FROZEN = nn.Parameter(torch.ones(4, 6), requires_grad=False)

BAD_PARAMETERS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a vector": ([group(matrix(3))], r"layers\.0\.weight has shape \(3,\); expected two dimensions or more"),
    "a stack": ([group(matrix(2, 3, 4))], r"layers\.0\.weight has shape \(2, 3, 4\).*flatten=True.*flatten=False"),
    "twice in one list": ([group(matrix(), SHARED, SHARED)], r"layers\.2\.weight is given twice"),
    "in two groups": ([group(SHARED), group(matrix(), SHARED, algorithm="adamw")], r"layers\.1\.weight is given twice"),
    "integers": ([group(INTEGERS)], r"layers\.0\.weight has dtype torch.int64; expected a floating-point"),
    "complex": ([group(COMPLEX)], r"layers\.0\.weight has dtype torch.complex64; expected a floating-point"),
    "sparse": ([group(SPARSE)], r"layers\.0\.weight has layout torch.sparse_coo; expected a dense"),
    "frozen": ([group(FROZEN)], r"layers\.0\.weight is frozen \(requires_grad is False\)"),
    "sizes that do not add up": (
        [group(matrix(), split_sizes=(1, 2))],
        r"layers\.0\.weight has 4 rows, but split_sizes \(1, 2\) add up to 3",
    ),
    "sizes of columns that do not add up": (
        [group(matrix(), split_sizes=(2, 2), split_dim=1)],
        r"layers\.0\.weight has 6 columns, but split_sizes \(2, 2\) add up to 4",
    ),
    "negative sizes": ([group(matrix(), split_sizes=(5, -1))], r"layers\.0\.weight .*split_sizes \(5, -1\)"),
    "heads that do not divide": (
        [group(matrix(), num_heads=3)],
        r"layers\.0\.weight has 4 rows; expected a multiple of num_heads 3",
    ),
    "no heads": ([group(matrix(), num_heads=0)], r"layers\.0\.weight .* num_heads 0"),
}


@pytest.mark.parametrize(("groups", "sentence"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_a_bad_parameter_is_refused_by_its_name(groups, sentence):
    with pytest.raises(ValueError, match=rf"^parameter {sentence}"):
        MuonAdamW(groups)


@pytest.mark.parametrize(("groups", "sentence"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_a_bad_parameter_without_a_name_is_refused_by_its_place(groups, sentence):
    unnamed = [g | {"params": [p for _, p in g["params"]]} for g in groups]
    place = sentence.split()[0].split(r"\.")[1]
    with pytest.raises(ValueError, match=rf"^parameter {place} of group \d, of shape \(.*\),"):
        MuonAdamW(unnamed)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "negative rate": ({"lr": -1.0}, r"has lr -1\.0; expected zero or a positive number"),
    "rate that is no number": ({"lr": float("nan")}, "has lr nan"),
    "infinite rate": ({"lr": float("inf")}, "has lr inf"),
    "negative rate of AdamW": ({"lr": -1.0, "algorithm": "adamw"}, r"has lr -1\.0"),
    "negative rate as a tensor": ({"lr": torch.tensor(-1.0)}, r"has lr -1\.0"),
    "infinite decay": ({"weight_decay": float("inf")}, "has weight_decay inf"),
    "momentum of one": ({"momentum": 1.0}, r"has momentum 1\.0; expected a number of at least 0 and below 1"),
    "betas": ({"betas": (0.9, 1.5), "algorithm": "adamw"}, r"has betas\[1\] 1\.5"),
    "eps": ({"eps": -1.0, "algorithm": "adamw"}, r"has eps -1\.0"),
    "variant": ({"variant": "newton"}, "optim.variant is 'newton'; expected one of jordan"),
    "scale": ({"adjust_lr_fn": "rms"}, "adjust_lr_fn is 'rms'; expected one of original"),
    "arithmetic": ({"ns_dtype": "int8"}, "has ns_dtype 'int8'; expected one of auto"),
    "steps": ({"ns_steps": 0}, "ns_steps is 0; expected at least one step"),
    "coefficients": ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients is \(1\.0, 2\.0\); expected one triple"),
    "axis": ({"normuon_axis": 0}, "has normuon_axis 0; expected -1 or -2"),
    "dimension": ({"split_dim": 2}, "has split_dim 2; expected 0 or 1"),
    "sizes and heads": ({"split_sizes": (2, 2), "num_heads": 2}, "has both split_sizes and num_heads"),
    "no algorithm": ({"algorithm": None}, r"has algorithm None; expected 'muon' or 'adamw'.*param_groups"),
    "misspelt key": ({"momentm": 0.9}, "has the unknown key 'momentm'; .* is it 'momentum'"),
    "another optimizer's key": ({"amsgrad": True}, "has the unknown key 'amsgrad'"),
}


@pytest.mark.parametrize(("options", "sentence"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_option_is_refused_by_the_name_of_its_group(options, sentence):
    with pytest.raises(ValueError, match=rf"^blocks:? {sentence}"):
        MuonAdamW([group(matrix(), name="blocks", **options)])
    with pytest.raises(ValueError, match=rf"^group 1:? {sentence}"):
        MuonAdamW([group(matrix()), group(matrix(), **options)])


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = MuonAdamW([group(matrix())])
    with pytest.raises(ValueError, match="given twice"):
        optimizer.add_param_group(group(matrix(), SHARED, SHARED))
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


def test_a_set_of_parameters_is_refused():
    with pytest.raises(TypeError, match="group 0 is given a set"):
        MuonAdamW([{"params": {matrix()}, "algorithm": "muon"}])


def test_keys_of_schedulers_and_names_are_known():
    keys = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
    MuonAdamW([group(matrix(), name="blocks", **dict.fromkeys(keys, 0.1))])
    old = toy_optimizer(toy())
    MuonAdamW([dict(g) for g in old.param_groups])


def test_a_scheduler_may_add_keys_of_its_own():
    optimizer = toy_optimizer(toy())
    for g in optimizer.param_groups:
        g["lr_scale"] = 0.5
    restored = toy_optimizer(toy())
    restored.load_state_dict(optimizer.state_dict())
    assert all(g["lr_scale"] == 0.5 for g in restored.param_groups)


class Stack(nn.Module):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.weight = parameter


@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        (matrix(2, 3, 4), r"experts\.weight has shape \(2, 3, 4\) and is no convolution's.*algorithm 'adamw'"),
        (COMPLEX, r"experts\.weight has dtype torch.complex64"),
        (SPARSE, r"experts\.weight has layout torch.sparse_coo"),
    ],
    ids=["a stack", "complex", "sparse"],
)
def test_routing_refuses_by_name_what_fits_neither_half(parameter, sentence):
    with pytest.raises(ValueError, match=rf"^parameter {sentence}"):
        param_groups(Stack(parameter))


def test_routing_refuses_patterns_that_match_no_matrix_and_cuts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"the pattern 'kqv\.weight' matches none of the 4 matrices"):
        param_groups(toy(), split_sizes={"kqv.weight": (8, 8)})
    with pytest.raises(ValueError, match=r"parameter qkv\.weight has 16 rows, but split_sizes \(8, 4\)"):
        param_groups(toy(), split_sizes={"qkv.weight": (8, 4)})
    with pytest.raises(ValueError, match=r"parameter qkv\.weight has 16 rows; expected a multiple of num_heads 3"):
        param_groups(toy(), num_heads={"qkv.weight": 3})


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_sparse_gradient_is_refused_by_the_name_of_its_parameter(algorithm):
    embedding, other = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4, bias=False)
    members = [("body.weight", other.weight), ("embedding.weight", embedding.weight)]
    optimizer = MuonAdamW([{"params": members, "algorithm": algorithm}])
    before = [p.detach().clone() for _, p in members]
    other(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of parameter embedding\.weight has layout torch\.sparse_coo"):
        optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(members, before, strict=True))


def renamed(state: dict[str, Any]) -> None:
    names = state["param_groups"][0]["param_names"]
    names[0] = "other.weight"


def reshaped(state: dict[str, Any]) -> None:
    state["state"][0]["momentum"] = torch.zeros(3, 3)


def without_a_parameter(state: dict[str, Any]) -> None:
    state["param_groups"][-1]["params"].pop()
    state["param_groups"][-1]["param_names"].pop()


def without_names_and_a_parameter(state: dict[str, Any]) -> None:
    for g in state["param_groups"]:
        del g["param_names"]
    state["param_groups"][-1]["params"].pop()


def with_another_parameter(state: dict[str, Any]) -> None:
    state["param_groups"][-1]["params"].append(99)
    state["param_groups"][-1]["param_names"].append("extra.bias")


def with_a_group_less(state: dict[str, Any]) -> None:
    last = state["param_groups"].pop()
    state["param_groups"][-1]["params"].extend(last["params"])
    state["param_groups"][-1]["param_names"].extend(last["param_names"])


def without_a_state(state: dict[str, Any]) -> None:
    del state["state"][1]


def of_another_rule(state: dict[str, Any]) -> None:
    state["state"][0] = {"exp_avg": state["state"][0]["momentum"]}


OTHER_STATES = {
    renamed: r"it holds other\.weight where .*first\.weight is expected",
    reshaped: r"state of parameter first\.weight is .*\(3, 3\)",
    without_a_parameter: r"it holds nothing where .* is expected",
    without_names_and_a_parameter: r"it holds 11 parameters; expected this optimizer's 12",
    with_another_parameter: r"it holds extra\.bias where nothing is expected",
    with_a_group_less: "different number of parameter groups",
    without_a_state: r"state of parameter second\.weight is \{\}",
    of_another_rule: r"state of parameter first\.weight is \{'exp_avg'",
}


@pytest.mark.parametrize(("change", "sentence"), OTHER_STATES.items(), ids=[c.__name__ for c in OTHER_STATES])
def test_the_state_of_another_model_is_refused_and_nothing_is_changed(change, sentence):
    model = toy(tied=False)
    optimizer = toy_optimizer(model)
    train(model, optimizer, range(1))
    foreign = copy.deepcopy(optimizer.state_dict())
    for state in foreign["state"].values():
        for value in state.values():
            value += 1
    for g in foreign["param_groups"]:
        g["lr"] = 123.0
    change(foreign)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(foreign)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for ours, theirs in zip(after["state"].values(), before["state"].values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    train(model, optimizer, range(1, 2))
    assert all(p.isfinite().all() for p in weights_of(model).values())
