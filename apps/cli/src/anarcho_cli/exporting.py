"""Handing a model on: as a Hugging Face directory with a card, which mlx-lm reads, too, or as one GGUF file for llama.cpp."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anarcho_cli.model_card import Facts, model_card, read_facts

CARD = "README.md"


def export_directory(model: Path, out: Path, *, source: Path, dtype: str | None, licence: str | None) -> Path:
    """Write a model directory with its tokenizer and a card; ``dtype`` None keeps the type of the weights.

    ``model`` is the model's directory, ``source`` the run or directory that the user named.
    """
    import torch
    from anarcho_model.directory import EMBEDDING
    from anarcho_model.weights import load_config, load_pretrained, open_weights, save_pretrained
    from anarcho_tokenize import load_tokenizer

    tokenizer = load_tokenizer(model)
    stored = open_weights(load_config(model), model).tensor(EMBEDDING).dtype
    loaded = load_pretrained(model, dtype=stored if dtype is None else getattr(torch, dtype))
    with _staged(out) as staging:
        staging.mkdir(parents=True)
        stops = _stop_ids(model, tokenizer)
        save_pretrained(loaded, staging, eos_token_id=stops, pad_token_id=tokenizer.pad_id)
        tokenizer.save(staging)
        (staging / CARD).write_text(model_card(_facts(model, source, out, licence)), encoding="utf-8")
    return out


def export_gguf(
    model: Path, out: Path, *, source: Path, element_type: str, licence: str | None
) -> tuple[Path, list[str]]:
    """Write a GGUF file; returns it and what llama.cpp does otherwise than this project, a sentence for each."""
    from anarcho_model.gguf.writing import write_gguf
    from anarcho_model.weights import load_config, open_weights
    from anarcho_tokenize import load_tokenizer
    from anarcho_tokenize.gguf_fields import differences, fields_of

    config, tokenizer = load_config(model), load_tokenizer(model)
    files = open_weights(config, model)
    fields = fields_of(tokenizer, vocab_size=config.vocab_size)
    with _staged(out) as staging:
        staging.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(
            config,
            lambda name: files.tensor(name).float().numpy(),
            staging,
            tokenizer=fields,
            element_type=element_type,
            name=_facts(model, source, out, licence).name,
            licence=licence,
        )
    return out, differences(tokenizer)


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A path beside ``out`` that takes its place when all is written, and is removed when it is not."""
    staging = out.with_name(f".{out.name}.partial")
    _remove(staging)
    try:
        yield staging
        staging.rename(out)
    finally:
        _remove(staging)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _stop_ids(model: Path, tokenizer: Any) -> list[int]:
    """What ends a text or an answer: other programs know no conversations but by these."""
    from anarcho_model.directory import load_stop_token_ids
    from anarcho_tokenize import end_of_message

    end = end_of_message(tokenizer)
    return list(dict.fromkeys([*load_stop_token_ids(model), tokenizer.eot_id, *([] if end is None else [end])]))


def _facts(model: Path, source: Path, out: Path, licence: str | None) -> Facts:
    return read_facts(model, source=source, name=out.stem if out.suffix == ".gguf" else out.name, licence=licence)
