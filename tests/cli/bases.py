"""Small models that tests begin with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anarcho_model import ModelConfig
from anarcho_tokenize import TokenizerConfig, train_tokenizer


def save_base(directory: Path, texts: Iterable[str], *, seed: int = 0, **shape: Any) -> Path:
    """Writes an untrained model of this shape, with a tokenizer of these texts, into a directory that is there; returns the directory."""
    from anarcho_model.torch import GPT
    from anarcho_model.weights import save_pretrained

    tokenizer = train_tokenizer(texts, config=TokenizerConfig(vocab_size=shape["vocab_size"]))
    model = GPT(ModelConfig(**shape))
    model.init_weights(seed=seed)
    save_pretrained(model, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    tokenizer.save(directory)
    return directory
