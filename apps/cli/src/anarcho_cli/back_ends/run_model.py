"""How a run's model begins, what of it is trained by what, and how it is saved: the same with the modules of either framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarcho_optim.groups import adamw_options
from anarcho_tokenize import AnyTokenizer

from anarcho_cli.back_ends.settings import special_tokens
from anarcho_cli.config import RunConfig

ADAPTER = "adapter"
"""The folder of a checkpoint with the adapter, in PEFT's format."""


@dataclass(frozen=True, kw_only=True)
class RunModel:
    """What a run does with its model besides training it; models are those of the modules' framework."""

    config: RunConfig
    """The run's."""
    tokenizer: AnyTokenizer
    """Is saved with the model."""
    base: Path
    """The model directory to begin with, if it is there."""
    weights: Any
    """`anarcho_model.weights`, or its sibling in MLX."""
    lora: Any
    """`anarcho_model.lora.torch`, or its sibling in MLX."""
    peft: Any
    """`anarcho_model.lora.peft`, or its sibling in MLX."""

    def prepare(self, model: Any) -> None:
        """Gives a new model its first weights, and a new adapter where the run trains one."""
        self.set_first_weights(model)
        if self.config.lora.rank:
            self.lora.add_adapter(model, self.config.lora, seed=self.config.train.seed)
        model.gradient_checkpointing = self.config.train.gradient_checkpointing is True
        model.narrow_residual = self.config.train.narrow_residual
        if self.config.train.float8:  # MLX refuses it, and its models do not have it
            model.float8 = True

    def set_first_weights(self, model: Any) -> None:
        """The weights of the directory ``base`` where that is there, else random ones; an adapter stays as it is."""
        if self.base.is_dir():
            self.weights.load_weights(model, self.base)
        else:
            model.init_weights(seed=self.config.train.seed, init=self.config.init)

    def groups(self, model: Any, *, routing: Any) -> Any:
        """The groups of the optimizer, with its own function; an adapter's thin matrices are Muon's only if the configuration says so."""
        if not self.config.lora.rank or self.config.lora.optimizer == "muon":
            return routing(model, config=self.config.optim)
        named = list(self.lora.adapter_parameters(model).items())
        return [{"name": "adapter", "params": named, **adamw_options(self.config.optim)}]

    def save(self, model: Any, directory: Path) -> None:
        """A model directory that is whole in itself; an adapter, which is merged into its weights, lies in a folder of its own, too."""
        self.weights.save_pretrained(model, directory, **special_tokens(self.config, self.tokenizer))
        self.tokenizer.save(directory)
        if model.adapter is not None:
            self.peft.save_adapter(model, directory / ADAPTER)

    def load(self, model: Any, directory: Path) -> None:
        """What is trained: all weights, or those of the adapter, since the base's are there already."""
        if model.adapter is None:
            self.weights.load_weights(model, directory)
        else:
            self.peft.load_adapter(model, directory / ADAPTER)
