"""What follows from the configuration of a run, whichever the framework: special tokens and random draws."""

from __future__ import annotations

from typing import Any

from anarcho_tokenize import AnyTokenizer, end_of_message
from anarcho_train import TrainingDraws

from anarcho_cli.config import RunConfig


def stop_token_ids(config: RunConfig, tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """What ends a text, and after tuning an answer, too: other programs end conversations by these alone."""
    end = None if config.data.kind == "text" else end_of_message(tokenizer)
    return tuple(dict.fromkeys([tokenizer.eot_id, *([] if end is None else [end])]))


def special_tokens(config: RunConfig, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """The tokens that `save_pretrained` names in a model directory."""
    stops = stop_token_ids(config, tokenizer)
    return {"eos_token_id": stops[0] if len(stops) == 1 else stops, "pad_token_id": tokenizer.pad_id}


def training_draws(config: RunConfig) -> TrainingDraws | None:
    """What is random in the run's training; None where nothing is."""
    dropout = bool(config.lora.rank and config.lora.dropout)
    if not (config.train.neftune_alpha or dropout):
        return None
    return TrainingDraws(
        seed=config.train.seed, dim=config.model.dim, neftune_alpha=config.train.neftune_alpha, dropout=dropout
    )


def require_fitting(config: RunConfig, tokenizer: AnyTokenizer) -> None:
    """The model must have a row for each piece; raises ValueError."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size is {config.model.vocab_size}, but the run's tokenizer has {tokenizer.vocab_size} pieces; "
            "leave model.vocab_size out, it follows the tokenizer"
        )
