"""Settings and shapes of a low-rank adapter, free of any framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from anarcho_model.config import ModelConfig

__all__ = ["LoraConfig", "LoraTarget", "adapter_shapes", "require_addable"]

LoraTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]
_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (LoRA, Hu et al. 2021): the matrices stay as they are, and the product of two thin ones is added to each."""

    rank: int = 0
    """Rows of A and columns of B: each matrix W becomes `W + scale * B A`; 0 trains the whole model."""
    alpha: float = 16.0
    """The addition is scaled by `alpha / rank`."""
    rank_stabilized: bool = False
    """Whether it is scaled by `alpha / sqrt(rank)` instead, so that large ranks learn as fast as small ones (rsLoRA)."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is left out at each step, at random."""
    targets: tuple[LoraTarget, ...] = _TARGETS
    """Which of a block's matrices are adapted: q, k, v, o of the attention, gate, up, down of the feed-forward layer."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Which half of the optimizer trains A and B, at the learning rate of that half; AdamW learned faster when it was measured."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank is {self.rank}; expected zero or a positive whole number")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha is {self.alpha}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; expected a share of at least 0 and below 1")
        for target in self.targets:
            if target not in _TARGETS:
                raise ValueError(f"lora.targets names {target!r}; expected some of {', '.join(_TARGETS)}")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"lora.targets is {list(self.targets)}; expected at least one matrix, each named once")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"lora.optimizer is {self.optimizer!r}; expected one of adamw, muon")

    @property
    def scale(self) -> float:
        """Factor of the product of B and A; the rank must not be 0."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def is_target(self, module: str) -> bool:
        """Whether the module of this name, such as `model.layers.0.mlp.up_proj`, is adapted."""
        return module.rpartition(".")[2].removesuffix("_proj") in self.targets


def adapter_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Name of each of the adapter's matrices in a model of this configuration -> its shape.

    Raises:
        ValueError: the rank is larger than a side of a matrix, which would make the addition larger than what it adds to.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in config.tensor_shapes().items():
        module = name.removesuffix(".weight")
        if not (module.endswith("_proj") and lora.is_target(module)):
            continue
        outputs, inputs = shape
        if lora.rank > min(outputs, inputs):
            raise ValueError(
                f"lora.rank is {lora.rank}, more than {name} of shape {outputs} x {inputs} has; "
                f"expected at most {min(outputs, inputs)}"
            )
        shapes[f"{module}.lora_A.weight"] = (lora.rank, inputs)
        shapes[f"{module}.lora_B.weight"] = (outputs, lora.rank)
    return shapes


def require_addable(config: ModelConfig, lora: LoraConfig, *, adapted: bool) -> None:
    """Refuse an adapter that a model of this configuration, `adapted` already or not, cannot be given; raises ValueError."""
    if adapted:
        raise ValueError("the model has an adapter already; merge it before adding another one")
    if lora.rank < 1:
        raise ValueError(f"lora.rank is {lora.rank}; expected at least 1 for an adapter")
    adapter_shapes(config, lora)
