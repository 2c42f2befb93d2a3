"""Saving and loading a model as a Hugging Face directory, for MLX.

Notable: the files are those of `anarcho_model.weights`, so that a model goes from one framework to the other and to
    whatever reads Hugging Face's directories. Tied weights are written once. Writing is not atomic and not flushed to the
    disk: who needs that writes beside the final name, calls fsync and renames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from anarcho_model.config import ModelConfig
from anarcho_model.directory import (
    EMBEDDING,
    WEIGHTS_FILE,
    DirectoryError,
    WeightHeaders,
    load_config,
    load_stop_token_ids,
    write_config_files,
)
from anarcho_model.lora.mlx import merged_state
from anarcho_model.mlx import GPT

__all__ = [
    "DirectoryError",
    "load_config",
    "load_pretrained",
    "load_stop_token_ids",
    "load_weights",
    "save_pretrained",
    "write_tensors",
]


def save_pretrained(
    model: GPT,
    directory: str | Path,
    *,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    dtype: mx.Dtype | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into `directory`, which is made if missing.

    The addition of an adapter is part of the weights that are written; `lora.peft_mlx.save_adapter` writes it alone.
    `dtype` is the element type in the file; None keeps the parameters' own.

    Raises:
        OSError: the files find no room.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.astype(dtype or tensor.dtype) for name, tensor in merged_state(model).items()}
    written = str(tensors[EMBEDDING].dtype).removeprefix("mlx.core.")
    write_config_files(model.config, directory, eos_token_id=eos_token_id, pad_token_id=pad_token_id, dtype=written)
    write_tensors(directory / WEIGHTS_FILE, tensors)


def write_tensors(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """A safetensors file, by way of a file of Python's: MLX's own writer says nothing when the disk is full. Raises OSError."""
    try:
        with path.open("wb") as file:
            mx.save_safetensors(file, dict(tensors), metadata={"format": "pt"})
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}); free space there and write it again") from error


def load_weights(model: GPT, directory: str | Path) -> None:
    """Copy the weights of a directory into `model`, converted to its element type; an adapter stays as it is.

    Raises:
        FileNotFoundError: there is neither `model.safetensors` nor an index of several files, or one of those is missing.
        DirectoryError: a file is damaged, or its tensors are not this model's; nothing has been copied then.
    """
    tensors = _read(directory, model.config)
    parameters = model.named_parameters()
    loaded = [(name, tensors[name].astype(parameters[name].dtype)) for name in model.config.tensor_shapes()]
    mx.eval([tensor for _, tensor in loaded])  # now, because the files may be replaced
    model.load_weights(loaded, strict=False)  # all of the model's: what is left is an adapter's


def load_pretrained(directory: str | Path, *, dtype: mx.Dtype | None = None) -> GPT:
    """Build the model that `config.json` describes and load its weights; `dtype` None means float32.

    The model computes in the type of its weights; `compute_dtype` may be set to another.

    Raises:
        FileNotFoundError: a file is missing.
        DirectoryError: a file is damaged, unsupported or does not fit the other.
    """
    model = GPT(load_config(directory))
    model.set_dtype(dtype or mx.float32)
    load_weights(model, directory)
    model.compute_dtype = dtype or mx.float32
    return model


def _read(directory: str | Path, config: ModelConfig) -> dict[str, mx.array]:
    """The tensors of a directory, which are those of the configuration, not yet read from the disk."""
    headers = WeightHeaders(directory)  # checks what mx.load would believe
    files: dict[Path, Any] = {}
    for path in headers.paths:
        try:
            files[path] = mx.load(str(path), format="safetensors")
        except RuntimeError as error:
            raise DirectoryError(f"{path} is damaged ({error}), expected a safetensors file.") from error
    tensors = {name: files[path][name] for name, path in headers.homes.items()}
    headers.check(config, equal=lambda one, other: bool(mx.array_equal(tensors[one], tensors[other]).item()))
    return tensors
