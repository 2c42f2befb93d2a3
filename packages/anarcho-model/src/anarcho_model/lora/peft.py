"""An adapter of a model in PyTorch as a directory in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Notable: where such a directory may lie, see `anarcho_model.lora.directory`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from anarcho_model.lora.directory import ADAPTER_CONFIG_FILE, ADAPTER_FILE, PREFIX, adapter_file, write_settings
from anarcho_model.lora.torch import adapter_parameters
from anarcho_model.torch import GPT

__all__ = ["ADAPTER_CONFIG_FILE", "ADAPTER_FILE", "load_adapter", "save_adapter"]


def save_adapter(model: GPT, directory: str | Path) -> None:
    """Write the adapter of `model` into `directory`, which is made if missing.

    Raises:
        ValueError: the model has no adapter.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter; add one before saving it")
    write_settings(model.adapter.config, Path(directory))
    tensors = {
        PREFIX + name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(model).items()
    }
    save_file(tensors, Path(directory) / ADAPTER_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: GPT, directory: str | Path) -> None:
    """Copy the weights of an adapter of the same settings into that of `model`.

    Raises:
        FileNotFoundError: the file is missing.
        DirectoryError: it is damaged, or its tensors are not those of this adapter; nothing has been copied then.
    """
    parameters = adapter_parameters(model)
    tensors = load_file(adapter_file(directory, {name: tensor.shape for name, tensor in parameters.items()}))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[PREFIX + name])
