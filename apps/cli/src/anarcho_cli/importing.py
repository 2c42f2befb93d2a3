"""Taking over a model that was made elsewhere: a Hugging Face directory, or a GGUF file, becomes a directory of our own.

Notable: the directory appears under its name only when it is whole. A tokenizer that gains special tokens gives the model rows at the
end of its embeddings, each the mean of those that it has, so that a new token is neither likelier nor rarer than the average one.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anarcho_model import ModelConfig
    from anarcho_tokenize import AnyTokenizer
    from torch import Tensor

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model as it was found."""

    config: ModelConfig
    tokenizer: AnyTokenizer
    tensors: dict[str, Tensor]
    stop_ids: tuple[int, ...]
    stored_as: str
    """Element types of its file, for people."""


def import_model(source: Path, out: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write the directory ``out``; ``dtype`` None keeps the type of a directory, and means float32 for a GGUF file.

    Returns what there is to tell of it. Raises the ValueError or OSError of a model that cannot be taken over.
    """
    foreign = _from_gguf(source) if source.is_file() else _from_directory(source)
    foreign = _with_rows(foreign)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        _write(foreign, staging, dtype=dtype)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "directory": str(out),
        "architecture": "Qwen3" if foreign.config.qk_norm else "Llama",
        "parameters": foreign.config.num_parameters,
        "context_length": foreign.config.context_length,
        "vocab_size": foreign.config.vocab_size,
        "tokenizer": type(foreign.tokenizer).__name__,
        "conversations": foreign.tokenizer.chat_format is not None,
        "stored_as": foreign.stored_as,
    }


def _from_gguf(source: Path) -> Foreign:
    import torch
    from anarcho_model.gguf.reading import GgufModel
    from anarcho_tokenize.gguf_fields import tokenizer_of_fields

    model = GgufModel(source)
    fields = model.tokenizer
    tokenizer = tokenizer_of_fields(fields, name=str(source))
    named = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return Foreign(
        config=model.config,
        tokenizer=tokenizer,
        tensors={name: torch.from_numpy(tensor) for name, tensor in model.tensors()},
        stop_ids=_stops(tokenizer, [token for token in named if token is not None]),
        stored_as=", ".join(model.element_types),
    )


def _from_directory(source: Path) -> Foreign:
    from anarcho_model.directory import load_stop_token_ids
    from anarcho_model.weights import load_config, open_weights
    from anarcho_tokenize import load_tokenizer

    config, tokenizer = load_config(source), load_tokenizer(source)
    files = open_weights(config, source)
    tensors = {name: files.tensor(name) for name in config.tensor_shapes()}
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return Foreign(
        config=config,
        tokenizer=tokenizer,
        tensors=tensors,
        stop_ids=_stops(tokenizer, load_stop_token_ids(source)),
        stored_as=", ".join(sorted(types)),
    )


def _stops(tokenizer: AnyTokenizer, named: Sequence[int]) -> tuple[int, ...]:
    """What a model was found to stop at, the end of a text, and what its chat template ends a message with."""
    from anarcho_tokenize import end_of_message
    from anarcho_tokenize.chat_template import ChatTemplate

    known = tokenizer.chat_format is not None and isinstance(tokenizer.chat_format, ChatTemplate)
    end = end_of_message(tokenizer) if known else None
    return tuple(dict.fromkeys([*named, tokenizer.eot_id, *([] if end is None else [end])]))


def _with_rows(foreign: Foreign) -> Foreign:
    """The model with a row of its embeddings for every token."""
    import torch

    lacking = foreign.tokenizer.vocab_size - foreign.config.vocab_size
    if lacking <= 0:
        return foreign
    tensors = dict(foreign.tensors)
    for name in (_EMBEDDING, _HEAD):
        if name in tensors:
            mean = tensors[name].float().mean(dim=0, keepdim=True).to(tensors[name].dtype)
            tensors[name] = torch.cat([tensors[name], mean.expand(lacking, -1)])
    config = dataclasses.replace(foreign.config, vocab_size=foreign.tokenizer.vocab_size)
    return dataclasses.replace(foreign, config=config, tensors=tensors)


def _write(foreign: Foreign, directory: Path, *, dtype: str | None) -> None:
    import torch
    from anarcho_model.directory import WEIGHTS_FILE, write_config_files
    from safetensors.torch import save_file

    wanted = None if dtype is None else getattr(torch, dtype)
    tensors = {name: tensor.to(wanted or tensor.dtype).contiguous() for name, tensor in foreign.tensors.items()}
    write_config_files(
        foreign.config,
        directory,
        eos_token_id=foreign.stop_ids,
        pad_token_id=foreign.tokenizer.pad_id,
        dtype=str(tensors[_EMBEDDING].dtype).removeprefix("torch."),
    )
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    foreign.tokenizer.save(directory)
