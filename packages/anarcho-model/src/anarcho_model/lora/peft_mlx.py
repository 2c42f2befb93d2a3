"""An adapter of a model in MLX as a directory in PEFT's format: the files that `anarcho_model.lora.peft` writes and reads.

Notable: where such a directory may lie, see `anarcho_model.lora.directory`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from anarcho_model.lora.directory import ADAPTER_CONFIG_FILE, ADAPTER_FILE, PREFIX, adapter_file, write_settings
from anarcho_model.lora.mlx import adapter_parameters
from anarcho_model.mlx import GPT
from anarcho_model.weights_mlx import write_tensors

__all__ = ["ADAPTER_CONFIG_FILE", "ADAPTER_FILE", "load_adapter", "save_adapter"]


def save_adapter(model: GPT, directory: str | Path) -> None:
    """Write the adapter of `model` into `directory`, which is made if missing.

    Raises:
        ValueError: the model has no adapter.
        OSError: the files find no room.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter; add one before saving it")
    write_settings(model.adapter.config, Path(directory))
    tensors = {PREFIX + name: array for name, array in adapter_parameters(model).items()}
    write_tensors(Path(directory) / ADAPTER_FILE, tensors)


def load_adapter(model: GPT, directory: str | Path) -> None:
    """Copy the weights of an adapter of the same settings into that of `model`.

    Raises:
        FileNotFoundError: the file is missing.
        DirectoryError: it is damaged, or its tensors are not those of this adapter; nothing has been copied then.
    """
    parameters = adapter_parameters(model)
    path = adapter_file(directory, {name: array.shape for name, array in parameters.items()})
    tensors: Any = mx.load(str(path), format="safetensors")
    loaded = [(name, tensors[PREFIX + name].astype(array.dtype)) for name, array in parameters.items()]
    mx.eval([array for _, array in loaded])  # now, because the file may be replaced
    model.load_weights(loaded, strict=False)
