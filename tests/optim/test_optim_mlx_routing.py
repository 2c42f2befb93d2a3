"""`anarcho_optim.mlx` routes by module type and identity and clips attention logits to the threshold; bad input is named."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from anarcho_optim import OptimConfig
from anarcho_optim.mlx import MuonAdamW, ParamGroups, param_groups, qk_clip


class Model(nn.Module):
    """One module of every kind that is routed differently."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 16)
        self.attention = [nn.Linear(8, 8, bias=False), {"inner": nn.Linear(8, 12, bias=False)}]
        self.gate = nn.Linear(8, 1, bias=False)
        self.column = mx.ones((8, 1))
        self.conv = nn.Conv2d(3, 6, 2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.grouped = nn.Conv1d(6, 6, 3, groups=2, bias=False)
        self.gray = nn.Conv2d(1, 6, 3, bias=False)
        self.one_channel = nn.Conv2d(3, 1, 2, bias=False)
        self.transposed = nn.ConvTranspose1d(3, 6, 2, bias=False)
        self.norm = nn.RMSNorm(8)
        self.temperature = mx.array(1.0)
        self.head = nn.Linear(8, 20)


def routed(model: nn.Module, **options) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in param_groups(model, **options)}


def test_every_parameter_goes_to_the_group_that_its_module_says():
    groups = {name: set(members) for name, members in routed(Model()).items()}
    assert groups == {
        "matrices": {"qkv.weight", "attention.0.weight", "attention.1.inner.weight"},
        "convolutions": {"conv.weight", "grouped.weight", "gray.weight", "transposed.weight"},
        "embeddings": {"embedding.weight"},
        "heads": {"head.weight"},
        "small matrices": {"gate.weight", "column", "depthwise.weight", "one_channel.weight"},
        "gains and biases": {"qkv.bias", "conv.bias", "depthwise.bias", "norm.weight", "temperature", "head.bias"},
    }


def test_groups_carry_the_settings_of_the_configuration():
    config = OptimConfig(lr=0.1, adamw_lr=0.2, embedding_lr=0.3, weight_decay=0.4, adamw_weight_decay=0.5, normuon=True)
    groups = {group["name"]: group for group in param_groups(Model(), config=config)}
    assert isinstance(param_groups(Model()), ParamGroups)
    assert "matrices" in str(param_groups(Model()))
    assert {name: (group["algorithm"], group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "matrices": ("muon", 0.1, 0.4),
        "convolutions": ("muon", 0.1, 0.4),
        "embeddings": ("adamw", 0.3, 0.5),
        "heads": ("adamw", 0.2, 0.5),
        "small matrices": ("adamw", 0.2, 0.5),
        "gains and biases": ("adamw", 0.2, 0.0),
    }
    assert groups["matrices"]["normuon"]
    assert groups["convolutions"]["flatten"]
    assert {group["lr"] for group in param_groups(Model()) if group["algorithm"] == "adamw"} == {OptimConfig().lr}


def test_every_group_can_be_optimized():
    model = Model()
    optimizer = MuonAdamW(param_groups(model, split_sizes={"qkv.weight": (8, 4, 4)}))
    before = model.trainable_parameters()
    gradients = nn.utils.tree_map(mx.ones_like, before)
    optimizer.update(model, gradients)
    assert not mx.array_equal(model.gray.weight, before["gray"]["weight"])
    assert mx.isfinite(model.depthwise.weight).all()


@pytest.mark.parametrize("alias", ["head", "elsewhere"])
def test_what_shares_its_array_with_an_embedding_is_an_embedding_under_every_name(alias):
    model = Model()
    model[alias] = nn.Linear(8, 20, bias=False)
    model[alias].weight = model.embedding.weight
    groups = routed(model)
    assert set(groups["embeddings"]) == {"embedding.weight", f"{alias}.weight"}
    assert f"{alias}.weight" not in groups.get("heads", []) + groups["matrices"]


def test_frozen_parameters_are_left_out_and_a_quantized_table_still_marks_its_head():
    model = Model()
    model.embedding = nn.QuantizedEmbedding(20, 64)
    model.head = nn.Linear(64, 20, bias=False)
    model.qkv.freeze()
    groups = routed(model)
    assert "embeddings" not in groups
    assert groups["heads"] == ["head.weight"]
    assert not any(name.startswith("qkv") for members in groups.values() for name in members)


def test_patterns_give_matrices_groups_of_their_own():
    model = Model()
    options = {"split_sizes": {"qkv*": (8, 4, 4)}, "num_heads": {"attention.*.weight": 4, "conv.weight": 2}}
    groups = {group["name"]: group for group in param_groups(model, **options)}
    names = {name: [parameter for parameter, _ in group["params"]] for name, group in groups.items()}
    assert names["matrices split 8+4+4"] == ["qkv.weight"]
    assert names["matrices by 4 heads"] == ["attention.0.weight", "attention.1.inner.weight"]
    assert names["convolutions by 2 heads"] == ["conv.weight"]
    assert "matrices" not in names
    assert groups["matrices split 8+4+4"]["split_sizes"] == (8, 4, 4)
    assert groups["convolutions by 2 heads"]["flatten"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_sizes": {"wrong": (8, 8)}}, "'wrong' matches none"),
        ({"num_heads": {"norm.*": 2}}, "'norm.*' matches none"),
        ({"split_sizes": {"qkv.weight": (8, 4)}}, "parameter qkv.weight .* split_sizes"),
        ({"num_heads": {"qkv.weight": 3}}, "parameter qkv.weight .* num_heads 3"),
    ],
)
def test_patterns_that_match_nothing_or_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Model(), **options)


@pytest.mark.parametrize("parameter", [mx.ones((2, 3, 4)), mx.ones((2, 3), mx.int32), mx.ones((2, 3), mx.complex64)])
def test_a_parameter_that_fits_neither_half_is_refused_by_name(parameter):
    model = Model()
    model.attention[1]["experts"] = parameter
    with pytest.raises(ValueError, match=r"parameter attention\.1\.experts has"):
        param_groups(model)


def largest_logits(query: mx.array, key: mx.array, x: np.ndarray, *, head_dim: int) -> np.ndarray:
    """The largest pre-softmax logit of each query head over all pairs of rows of ``x``."""
    q = (x @ np.array(query).T).reshape(len(x), -1, head_dim)
    k = (x @ np.array(key).T).reshape(len(x), -1, head_dim)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("ihd,jhd->hij", q, k).max(axis=(1, 2))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_clipped_heads_reach_the_threshold_and_no_more_and_the_others_stay(key_heads):
    mx.random.seed(1)
    query, key = mx.random.normal((4 * 3, 5)), mx.random.normal((key_heads * 3, 5))
    query[:3] *= 10
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    before = largest_logits(query, key, x, head_dim=3)
    threshold = float(np.sort(before)[2]) - 1e-3
    new_query, new_key = qk_clip(query, key, max_logits=mx.array(before), threshold=threshold)
    after = largest_logits(new_query, new_key, x, head_dim=3)
    assert (before > threshold).sum() == 2
    assert np.allclose(after, np.minimum(before, threshold), rtol=1e-5)


def test_a_head_without_others_on_its_key_is_clipped_by_the_root_on_both_sides_and_dtypes_stay():
    query, key = mx.ones((4, 3), mx.bfloat16), mx.ones((4, 3))
    new_query, new_key = qk_clip(query, key, max_logits=mx.array([50.0, 400.0]))
    assert (new_query.dtype, new_key.dtype) == (mx.bfloat16, mx.float32)
    assert np.allclose(np.array(new_key)[:, 0], [1, 1, 0.5, 0.5])
    assert np.allclose(np.array(new_query.astype(mx.float32))[:, 0], [1, 1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("rows", "key_rows", "heads", "threshold", "message"),
    [
        (12, 12, 4, 0.0, "threshold is 0"),
        (12, 12, 5, 1.0, "query has 12 rows"),
        (12, 12, 0, 1.0, "query has 12 rows"),
        (12, 9, 4, 1.0, "key has 9 rows"),
        (12, 4, 4, 1.0, "key has 4 rows"),
        (12, 0, 4, 1.0, "key has 0 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(rows, key_rows, heads, threshold, message):
    with pytest.raises(ValueError, match=message):
        qk_clip(mx.ones((rows, 2)), mx.ones((key_rows, 2)), max_logits=mx.ones(heads), threshold=threshold)


def test_qk_clip_works_in_a_compiled_step():
    clip = mx.compile(lambda q, k, s: qk_clip(q, k, max_logits=s, threshold=1.0))
    query, _ = clip(mx.ones((4, 3)), mx.ones((4, 3)), mx.array([1.0, 4.0]))
    assert np.allclose(np.array(query)[:, 0], [1, 1, 0.5, 0.5])
