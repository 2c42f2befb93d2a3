"""`param_groups` routes by module type and identity: embeddings, whatever is tied to them and what has no matrix never reach Muon."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")

from anarcho_optim import OptimConfig  # noqa: E402
from anarcho_optim.torch import MuonAdamW, param_groups  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402
from torch_toy import SPLITS, toy, train  # noqa: E402


class Model(nn.Module):
    """A bag of modules by name."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def routes(model: nn.Module, **options) -> dict[str, str]:
    """The group of each parameter, by the parameter's name."""
    return {name: group["name"] for group in param_groups(model, **options) for name, _ in group["params"]}


def muon_names(model: nn.Module) -> set[str]:
    return {n for group in param_groups(model) if group["algorithm"] == "muon" for n, _ in group["params"]}


def test_every_kind_of_parameter_goes_to_its_group():
    model = toy(tied=False)
    assert routes(model) == {
        "qkv.weight": "matrices",
        "first.weight": "matrices",
        "second.weight": "matrices",
        "conv.weight": "convolutions",
        "embedding.weight": "embeddings",
        "head.weight": "heads",
        "depthwise.weight": "small matrices",
        "gate.weight": "small matrices",
        "conv.bias": "gains and biases",
        "depthwise.bias": "gains and biases",
        "norm.weight": "gains and biases",
        "first.bias": "gains and biases",
    }


def tied_head() -> nn.Module:
    model = Model(embedding=nn.Embedding(20, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 20, bias=False))
    model.head.weight = model.embedding.weight
    return model


def head_that_comes_first() -> nn.Module:
    model = Model(head=nn.Linear(8, 20, bias=False), body=nn.Linear(8, 8), embedding=nn.Embedding(20, 8))
    model.embedding.weight = model.head.weight
    return model


def embedding_under_two_modules() -> nn.Module:
    embedding = nn.Embedding(20, 8)
    return Model(encoder=Model(tokens=embedding), body=nn.Linear(8, 8), decoder=Model(tokens=embedding))


def alias_in_a_module_of_another_type() -> nn.Module:
    model = Model(a=Model(), body=nn.Linear(8, 8), embedding=nn.Embedding(20, 8))
    model.a.register_parameter("table", model.embedding.weight)
    return model


def untied_head() -> nn.Module:
    return Model(embedding=nn.Embedding(20, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 20))


def embedding_bag() -> nn.Module:
    return Model(bag=nn.EmbeddingBag(20, 8), body=nn.Linear(8, 8), head=nn.Linear(8, 20))


def tied_after_compilation() -> nn.Module:
    model = torch.compile(untied_head(), backend="eager")
    model.head.weight = model.embedding.weight
    return model


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized_embedding() -> nn.Module:
    model = untied_head()
    parametrize.register_parametrization(model.embedding, "weight", Doubled())
    return model


def parametrized_head() -> nn.Module:
    model = untied_head()
    parametrize.register_parametrization(model.head, "weight", Doubled())
    return model


def weight_norm_of_a_tied_head() -> nn.Module:
    model = tied_head()
    parametrizations.weight_norm(model.head)
    parametrizations.weight_norm(model.embedding)
    return model


EMBEDDINGS = [
    tied_head,
    head_that_comes_first,
    embedding_under_two_modules,
    alias_in_a_module_of_another_type,
    untied_head,
    embedding_bag,
    tied_after_compilation,
    parametrized_embedding,
    parametrized_head,
    weight_norm_of_a_tied_head,
]


@pytest.mark.parametrize("make", EMBEDDINGS)
def test_embeddings_and_heads_never_reach_muon(make):
    assert muon_names(make()) == {"body.weight"}


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), "convolutions"),
    "of one channel": (nn.Conv2d(1, 6, 3), "convolutions"),
    "to one channel": (nn.Conv2d(4, 1, 3), "small matrices"),
    "grouped": (nn.Conv1d(4, 6, 3, groups=2), "convolutions"),
    "depthwise": (nn.Conv1d(6, 6, 3, groups=6), "small matrices"),
    "depthwise with a multiplier": (nn.Conv3d(3, 6, 2, groups=3), "small matrices"),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), "convolutions"),
    "transposed to one channel": (nn.ConvTranspose2d(4, 1, 3), "convolutions"),
    "transposed, grouped, one channel out per group": (nn.ConvTranspose1d(4, 2, 3, groups=2), "convolutions"),
    "transposed, depthwise": (nn.ConvTranspose1d(6, 6, 3, groups=6), "small matrices"),
    "transposed, depthwise with a multiplier": (nn.ConvTranspose1d(3, 6, 3, groups=3), "small matrices"),
    "pointwise": (nn.Conv1d(4, 6, 1), "convolutions"),
    "pointwise, of one channel": (nn.Conv1d(1, 6, 1), "small matrices"),
}


@pytest.mark.parametrize(("module", "group"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_go_to_muon_but_depthwise_ones(module, group):
    assert routes(Model(conv=module)) == {"conv.weight": group, "conv.bias": "gains and biases"}
    groups = param_groups(Model(conv=module))
    assert all(g["flatten"] for g in groups if g["algorithm"] == "muon")
    MuonAdamW(groups)


@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_convolution_with_weight_norm_keeps_its_matrix_and_loses_its_scales(normalize):
    groups = routes(Model(conv=normalize(nn.Conv2d(4, 6, 3, bias=False))))
    assert sorted(groups.values()) == ["convolutions", "small matrices"]


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1), (0, 8), (8, 0)], ids=str)
def test_matrices_of_one_row_or_column_go_to_adamw(shape):
    linear = nn.Linear(2, 2, bias=False)
    linear.weight = nn.Parameter(torch.zeros(shape))
    assert routes(Model(linear=linear)) == {"linear.weight": "small matrices"}


def test_frozen_parameters_are_left_out_and_nothing_else():
    model = toy()
    model.first.weight.requires_grad_(False)
    assert set(routes(model)) == {n for n, p in model.named_parameters() if p.requires_grad}


WRAPPERS = {
    "compiled": functools.partial(torch.compile, backend="eager"),
    "data parallel": nn.DataParallel,
    "data parallel, compiled": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


def compiled_part(model: nn.Module) -> nn.Module:
    model.qkv = torch.compile(model.qkv, backend="eager")
    return model


def checkpointed_part(model: nn.Module) -> nn.Module:
    model.qkv = checkpoint_wrapper(model.qkv)
    return model


@pytest.mark.parametrize(
    "wrap",
    [*WRAPPERS.values(), compiled_part, checkpointed_part],
    ids=[*WRAPPERS, "compiled part", "checkpointed part"],
)
def test_wrappers_change_neither_names_nor_routes(wrap):
    assert routes(wrap(toy()), split_sizes=SPLITS) == routes(toy(), split_sizes=SPLITS)


def test_patterns_select_fused_weights_and_heads():
    groups = {g["name"]: g for g in param_groups(toy(), split_sizes={"qkv.*": (8, 4, 4)}, num_heads={"*st.weight": 2})}
    assert groups["matrices split 8+4+4"]["split_sizes"] == (8, 4, 4)
    assert [name for name, _ in groups["matrices by 2 heads"]["params"]] == ["first.weight"]
    assert [name for name, _ in groups["matrices"]["params"]] == ["second.weight"]


def test_patterns_tell_capitals_from_small_letters():
    with pytest.raises(ValueError, match=r"the pattern 'QKV\.\*' matches none of the 4 matrices"):
        param_groups(toy(), num_heads={"QKV.*": 2})


def test_groups_print_as_a_table_and_rates_follow_the_configuration():
    config = OptimConfig(lr=0.1, adamw_lr=0.2, embedding_lr=0.3, adamw_weight_decay=0.4, weight_decay=0.5)
    groups = param_groups(toy(tied=False), config=config)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {
        "matrices": (0.1, 0.5),
        "convolutions": (0.1, 0.5),
        "embeddings": (0.3, 0.4),
        "heads": (0.2, 0.4),
        "small matrices": (0.2, 0.4),
        "gains and biases": (0.2, 0.0),
    }
    lines = str(groups).splitlines()
    assert len(lines) == 1 + len(groups)
    assert lines[1].split() == ["muon", "3", "384", "0.1", "0.5", "matrices"]


def test_a_tied_table_is_updated_once_from_both_gradients():
    model = toy()
    before = model.embedding.weight.detach().clone()
    train(model, MuonAdamW(param_groups(model)), range(1))
    assert model.head.weight is model.embedding.weight
    assert not torch.equal(model.embedding.weight, before)
