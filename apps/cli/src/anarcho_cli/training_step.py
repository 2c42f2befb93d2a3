"""The training step of a run: the model on its device, the optimizer, the loss, and how they are saved; loads torch where it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_tokenize import AnyTokenizer, end_of_message
from anarcho_train import TrainingDraws

from anarcho_cli.config import RunConfig
from anarcho_cli.output import note

if TYPE_CHECKING:
    from anarcho_model.torch import GPT
    from anarcho_train.steps.torch import TorchStep

ADAPTER = "adapter"
"""The folder of a checkpoint with the adapter, in PEFT's format."""


def require_precision(config: RunConfig, device: str) -> None:
    """Refuses an arithmetic that the device does not have, before anything is written; loads torch."""
    import torch
    from anarcho_train.steps.torch import resolve_precision

    resolve_precision(config.train.precision, torch.device(device))


def make_step(config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str) -> TorchStep:
    """The model on its device, its optimizer, and the training step over both; loads torch."""
    import torch
    from anarcho_model.torch import GPT
    from anarcho_model.weights import load_weights
    from anarcho_optim.torch import MuonAdamW
    from anarcho_train.losses.torch_preference import PreferenceLoss
    from anarcho_train.steps.torch import TorchStep

    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the run's tokenizer has {tokenizer.vocab_size} pieces; "
            "leave model.vocab_size out, it follows the tokenizer"
        )
    torch.manual_seed(config.train.seed)  # Nothing is drawn from it; but checkpoints hold it, and are to be equal.
    model = GPT(config.model)
    if base.is_dir():
        load_weights(model, base)
    else:
        model.init_weights(seed=config.train.seed, init=config.init)
    if config.lora.rank:
        from anarcho_model.lora.torch import add_adapter

        add_adapter(model, config.lora, seed=config.train.seed)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.to(device)
    return TorchStep(
        model,
        MuonAdamW(_groups(model, config)),
        config=config.train,
        loss=PreferenceLoss(config.preference) if config.data.kind == "preference" else None,
        draws=_draws(config),
        save_model=lambda trained, directory: _save_model(trained, directory, config, tokenizer),
        load_model=_load_model,
        flops=config.flops_per_token * config.total_tokens,
        notify=note,
    )


def _groups(model: GPT, config: RunConfig) -> Any:
    """The groups of the optimizer; an adapter's thin matrices are Muon's only if the configuration says so."""
    from anarcho_optim.groups import adamw_options
    from anarcho_optim.torch import param_groups

    if not config.lora.rank or config.lora.optimizer == "muon":
        return param_groups(model, config=config.optim)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [{"name": "adapter", "params": named, **adamw_options(config.optim)}]


def _draws(config: RunConfig) -> TrainingDraws | None:
    """What is random in the run's training; None where nothing is."""
    dropout = bool(config.lora.rank and config.lora.dropout)
    if not (config.train.neftune_alpha or dropout):
        return None
    return TrainingDraws(
        seed=config.train.seed, dim=config.model.dim, neftune_alpha=config.train.neftune_alpha, dropout=dropout
    )


def stop_token_ids(config: RunConfig, tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """What ends a text, and after tuning an answer, too: other programs end conversations by these alone."""
    end = None if config.data.kind == "text" else end_of_message(tokenizer)
    return tuple(dict.fromkeys([tokenizer.eot_id, *([] if end is None else [end])]))


def _save_model(model: Any, directory: Path, config: RunConfig, tokenizer: AnyTokenizer) -> None:
    """A model directory that is whole in itself; an adapter, which is merged into its weights, lies in a folder of its own, too."""
    from anarcho_model.lora.peft import save_adapter
    from anarcho_model.weights import save_pretrained

    stops = stop_token_ids(config, tokenizer)
    save_pretrained(
        model, directory, eos_token_id=stops[0] if len(stops) == 1 else stops, pad_token_id=tokenizer.pad_id
    )
    tokenizer.save(directory)
    if model.adapter is not None:
        save_adapter(model, directory / ADAPTER)


def _load_model(model: Any, directory: Path) -> None:
    """What is trained: all weights, or those of the adapter, since the base's are there already."""
    from anarcho_model.lora.peft import load_adapter
    from anarcho_model.weights import load_weights

    if model.adapter is None:
        load_weights(model, directory)
    else:
        load_adapter(model, directory / ADAPTER)
