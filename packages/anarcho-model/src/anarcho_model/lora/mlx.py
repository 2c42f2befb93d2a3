"""Low-rank adapters in MLX: the same weights, dropout and names as `anarcho_model.lora.torch` (LoRA, Hu et al. 2021, arXiv:2106.09685).

Notable:

* a frozen matrix has no gradient, and what it reads is not kept for backward, nor is its cast to the compute dtype;
* dropout keeps the numbers of its tokens alone: backward draws again which inputs were left out.

Shapes: batch, length = sequences and tokens; inputs, outputs = widths of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from jaxtyping import Float, Int, UInt32

from anarcho_model.layers.mlx import Linear, project_frozen
from anarcho_model.lora.config import LoraConfig, require_addable
from anarcho_model.lora.draws import COLUMN, FACTOR, FEATURE, drop_threshold, first_matrix, layer_salt
from anarcho_model.mlx import GPT

__all__ = ["Adapter", "LoraLinear", "adapter_parameters", "add_adapter", "merge_adapter", "merged_state"]


def mix(numbers: UInt32[mx.array, "*shape"]) -> UInt32[mx.array, "*shape"]:
    """Scatter numbers over all those of 32 bits, one to one; products wrap around."""
    for _ in range(2):
        numbers = (numbers ^ (numbers >> 16)) * FACTOR
    return numbers ^ (numbers >> 16)


class Adapter:
    """What the adapted layers of one model share: settings, and the numbers of this forward pass from which dropout follows."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._tokens: tuple[mx.array, mx.array] | None = None

    def begin(self, keys: Int[mx.array, " batch"] | None, *, length: int) -> None:
        """A forward pass over rows of `length` tokens begins; None, or a negative number for a row, means no dropout."""
        if keys is None or not self.config.dropout:
            self._tokens = None
            return
        columns = mx.arange(length, dtype=mx.uint32) * COLUMN
        tokens = mix(keys.astype(mx.uint32)[:, None] + columns)
        self._tokens = tokens[..., None], (keys < 0)[:, None, None]

    def drop(self, x: Float[mx.array, "batch length inputs"], *, salt: int) -> Float[mx.array, "batch length inputs"]:
        """The inputs of the layer with this number, some of them left out and the others enlarged for it."""
        if self._tokens is None:
            return x
        rate = self.config.dropout

        def factors(tokens: mx.array, whole: mx.array, *, like: mx.array) -> mx.array:
            kept = _draws(tokens, features=like.shape[-1], salt=salt) >= mx.array(drop_threshold(rate), mx.uint32)
            return mx.where(whole, mx.array(1, like.dtype), kept.astype(like.dtype) / (1 - rate))

        @mx.custom_function
        def dropped(x: mx.array, tokens: mx.array, whole: mx.array) -> mx.array:
            return x * factors(tokens, whole, like=x)

        @dropped.vjp
        def _(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            # Of the gradient, or a compiled step would keep forward's factors instead of drawing them again.
            tokens, whole = mx.depends(list(primals[1:]), [cotangent])
            return cotangent * factors(tokens, whole, like=cotangent), mx.zeros_like(tokens), mx.zeros_like(whole)

        return dropped(x, *self._tokens)  # pyright: ignore[reportReturnType]


def _draws(
    tokens: UInt32[mx.array, "batch length 1"], *, features: int, salt: int
) -> UInt32[mx.array, "batch length features"]:
    return mix(mix(tokens ^ mx.array(salt, mx.uint32)) + mx.arange(features, dtype=mx.uint32) * FEATURE)


class LoraLinear(nn.Module):
    """A frozen linear layer without bias, and the addition that is learned."""

    def __init__(self, base: nn.Linear, adapter: Adapter, *, name: str, seed: int) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        rank = adapter.config.rank
        self.adapter, self.scale = adapter, adapter.config.scale
        self.weight = base.weight
        self.lora_A, self.lora_B = Linear(inputs, rank), Linear(rank, outputs)
        stream = f"{name}.lora_A.weight"
        self.salt = layer_salt(seed=seed, name=stream)
        drawn = first_matrix((rank, inputs), seed=seed, name=stream)
        self.lora_A.weight = mx.array(drawn).astype(base.weight.dtype)
        self.lora_B.weight = mx.zeros((outputs, rank), base.weight.dtype)
        self.freeze(recurse=False, keys="weight")

    def __call__(self, x: Float[mx.array, "batch length inputs"]) -> Float[mx.array, "batch length outputs"]:
        thin = self.lora_A(self.adapter.drop(x, salt=self.salt))
        return project_frozen(x, self.weight) + self.lora_B(thin * self.scale)  # pyright: ignore[reportOperatorIssue]

    def merged_weight(self) -> Float[mx.array, "outputs inputs"]:
        """A matrix that does the same alone, in the type of the frozen one."""
        return mx.addmm(self.weight, self.lora_B.weight, self.lora_A.weight, alpha=self.scale)


def add_adapter(model: GPT, config: LoraConfig, *, seed: int) -> None:
    """Freeze all weights of `model` and give it an adapter, whose first weights are those of PyTorch for the same seed.

    Raises:
        ValueError: the rank is 0 or larger than a side of a matrix, or there is an adapter already.
    """
    require_addable(model.config, config, adapted=model.adapter is not None)
    model.freeze()
    model.adapter = Adapter(config)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and config.is_target(name):
            _replace(model, name, LoraLinear(module, model.adapter, name=name, seed=seed))
    mx.eval(model.trainable_parameters())


def merge_adapter(model: GPT) -> None:
    """Make the adapter's addition a part of the matrices, which can be trained again; a model without an adapter stays as it is."""
    for name, module in _adapted(model):
        plain = Linear(1, 1)
        plain.weight = module.merged_weight()
        mx.eval(plain.weight)
        _replace(model, name, plain)
    model.adapter = None
    model.unfreeze()


def adapter_parameters(model: GPT) -> dict[str, mx.array]:
    """The adapter's weights by name; empty without one."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight
        for name, module in _adapted(model)
        for part in ("lora_A", "lora_B")
    }


def merged_state(model: GPT) -> dict[str, mx.array]:
    """The weights of the model that `merge_adapter` would make, by name; MLX computes each when it is used."""
    added = adapter_parameters(model)
    state = {name: array for name, array in model.named_parameters().items() if name not in added}
    return state | {f"{name}.weight": module.merged_weight() for name, module in _adapted(model)}


def _adapted(model: GPT) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers by name, in the order of the model's files."""
    modules = dict(model.named_modules())
    for name in model.config.tensor_shapes():
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, LoraLinear):
            yield name.removesuffix(".weight"), module


def _replace(model: GPT, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of the one with this name."""
    parent, _, attribute = name.rpartition(".")
    setattr(dict(model.named_modules())[parent], attribute, layer)
