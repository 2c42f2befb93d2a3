"""Low-rank adapters in PyTorch (LoRA, Hu et al. 2021, arXiv:2106.09685).

Notable:

* a matrix W is frozen, and `y = W x + scale * B A x` is computed in its place; A is drawn at random and B is zero, so that a model with
  a new adapter is the model without one;
* the names of all weights stay; the adapter's are `<module>.lora_A.weight` and `<module>.lora_B.weight`, as in PEFT;
* dropout is a function of numbers that the caller draws for each row of the batch, of the layer and of the place in the row. So it is
  the same when a block is computed again for its backward, and however the rows are split into batches.

Source of the scaling by the root of the rank: Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anarcho_model.lora.config import LoraConfig, require_addable
from anarcho_model.lora.draws import COLUMN, FACTOR, FEATURE, drop_threshold, first_matrix, layer_salt
from anarcho_model.torch import GPT

__all__ = ["Adapter", "LoraLinear", "adapter_parameters", "add_adapter", "merge_adapter", "merged_state"]

MASK = 2**32 - 1


def mix(numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Scatter numbers of 32 bits over all of them, one to one, the same on every device (multiply and xor-shift)."""
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * FACTOR) & MASK
    return numbers ^ (numbers >> 16)


class Adapter:
    """What the adapted layers of one model share: settings, and the numbers of this forward pass from which dropout follows."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._tokens: Tensor | None = None

    def begin(self, keys: Int[Tensor, " batch"] | None, *, length: int) -> None:
        """A forward pass over rows of `length` tokens begins; None, or a negative number for a row, means no dropout."""
        if keys is None or not self.config.dropout:
            self._tokens = None
            return
        columns = torch.arange(length, device=keys.device) * COLUMN
        tokens = mix((keys[:, None] + columns) & MASK)
        self._tokens = torch.where(keys[:, None] < 0, -1, tokens).reshape(-1)

    def drop(self, x: Float[Tensor, "tokens inputs"], *, salt: int) -> Float[Tensor, "tokens inputs"]:
        """The inputs of the layer with this number, some of them left out and the others enlarged for it."""
        if self._tokens is None:
            return x
        rate, tokens = self.config.dropout, self._tokens[:, None]
        features = torch.arange(x.shape[1], device=x.device) * FEATURE
        draws = mix((mix((tokens & MASK) ^ salt) + features) & MASK)
        factors = (draws >= drop_threshold(rate)).to(x.dtype) / (1 - rate)
        return x * factors.masked_fill(tokens < 0, 1)


class LoraLinear(nn.Module):
    """A frozen linear layer without bias, and the addition that is learned."""

    def __init__(self, base: nn.Linear, adapter: Adapter, *, name: str, seed: int) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        rank = adapter.config.rank
        self.adapter, self.scale = adapter, adapter.config.scale
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        options = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(inputs, rank, **options)
        self.lora_B = nn.Linear(rank, outputs, **options)
        stream = {"seed": seed, "name": f"{name}.lora_A.weight"}
        self.salt = layer_salt(**stream)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.from_numpy(first_matrix((rank, inputs), **stream)))
            self.lora_B.weight.zero_()

    def forward(self, x: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens outputs"]:
        thin = self.lora_A(self.adapter.drop(x, salt=self.salt))
        return F.linear(x, self.weight) + self.lora_B(thin * self.scale)

    @torch.no_grad()
    def merged_weight(self) -> Float[Tensor, "outputs inputs"]:
        """A matrix that does the same alone, in the type of the frozen one."""
        return torch.addmm(self.weight, self.lora_B.weight, self.lora_A.weight, alpha=self.scale)


def add_adapter(model: GPT, config: LoraConfig, *, seed: int) -> None:
    """Freeze all weights of `model` and give it an adapter; each A has its own random stream, derived from the seed and its name.

    Raises:
        ValueError: the rank is 0 or larger than a side of a matrix, or there is an adapter already.
    """
    require_addable(model.config, config, adapted=model.adapter is not None)
    model.requires_grad_(requires_grad=False)
    model.adapter = Adapter(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and config.is_target(name):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, LoraLinear(module, model.adapter, name=name, seed=seed))


def merge_adapter(model: GPT) -> None:
    """Make the adapter's addition a part of the matrices, which can be trained again; a model without an adapter stays as it is."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, attribute = name.rpartition(".")
            outputs, inputs = module.weight.shape
            plain = nn.Linear(inputs, outputs, bias=False, device="meta")
            plain.weight = nn.Parameter(module.merged_weight())
            setattr(model.get_submodule(parent), attribute, plain)
    model.adapter = None
    model.requires_grad_(requires_grad=True)


def adapter_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """The adapter's weights by name; empty without one."""
    return {
        f"{name}.{part}.weight": getattr(module, part).weight
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for part in ("lora_A", "lora_B")
    }


def merged_state(model: GPT) -> dict[str, Tensor]:
    """The weights of the model that `merge_adapter` would make, by name."""
    added = adapter_parameters(model)
    state: dict[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if name not in added}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.merged_weight()
    return state
