"""The training step of a run: the model on its device, the optimizer, the loss, and how they are saved; loads torch where it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_model.flops import training_flops_per_token
from anarcho_tokenize import AnyTokenizer

from anarcho_cli.config import RunConfig
from anarcho_cli.output import note

if TYPE_CHECKING:
    from anarcho_train.steps.torch import TorchStep


def require_precision(config: RunConfig, device: str) -> None:
    """Refuses an arithmetic that the device does not have, before anything is written; loads torch."""
    import torch
    from anarcho_train.steps.torch import resolve_precision

    resolve_precision(config.train.precision, torch.device(device))


def make_step(config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str) -> TorchStep:
    """The model on its device, its optimizer, and the training step over both; loads torch."""
    from anarcho_model.torch import GPT
    from anarcho_model.weights import load_weights, save_pretrained
    from anarcho_optim.torch import MuonAdamW, param_groups
    from anarcho_train.losses.torch_preference import PreferenceLoss
    from anarcho_train.steps.torch import TorchStep

    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the run's tokenizer has {tokenizer.vocab_size} pieces; "
            "leave model.vocab_size out, it follows the tokenizer"
        )
    model = GPT(config.model)
    if base.is_dir():
        load_weights(model, base)
    else:
        model.init_weights(seed=config.train.seed, init=config.init)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    model.to(device)

    def save_model(trained: Any, directory: Path) -> None:
        save_pretrained(trained, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
        tokenizer.save(directory)

    return TorchStep(
        model,
        MuonAdamW(param_groups(model, config=config.optim)),
        config=config.train,
        loss=PreferenceLoss(config.preference) if config.data.kind == "preference" else None,
        save_model=save_model,
        load_model=lambda trained, directory: load_weights(model, directory),
        flops=training_flops_per_token(config.model, config.sequence_length) * config.total_tokens,
        notify=note,
    )
