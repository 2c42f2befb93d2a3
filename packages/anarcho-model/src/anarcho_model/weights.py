"""Saving and loading a model as a Hugging Face directory, for PyTorch.

Notable: Transformers, mlx-lm, lm-eval and llama.cpp's converter read what is written here without an export step, and a
    Llama or Qwen3 of theirs is read back, in one file or several. Tied weights are written once. Writing is not atomic
    and not flushed to the disk: who needs that writes beside the final name, calls fsync and renames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from anarcho_model.config import ModelConfig
from anarcho_model.directory import (
    EMBEDDING,
    WEIGHTS_FILE,
    DirectoryError,
    WeightHeaders,
    load_config,
    load_stop_token_ids,
    opened,
    write_config_files,
)
from anarcho_model.lora.torch import merged_state
from anarcho_model.torch import GPT

__all__ = [
    "DirectoryError",
    "WeightFiles",
    "load_config",
    "load_pretrained",
    "load_stop_token_ids",
    "load_weights",
    "open_weights",
    "save_pretrained",
]


def save_pretrained(
    model: GPT,
    directory: str | Path,
    *,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into `directory`, which is made if missing.

    The addition of an adapter is part of the weights that are written; `lora.peft.save_adapter` writes it alone.
    `dtype` is the element type in the file; None keeps the parameters' own.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in merged_state(model).items()
    }
    written = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    write_config_files(model.config, directory, eos_token_id=eos_token_id, pad_token_id=pad_token_id, dtype=written)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


class WeightFiles(WeightHeaders):
    """The tensors of a directory, whether in one file or in several; each is read when it is asked for."""

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU."""
        with opened(self.homes[name], framework="pt") as file:
            return file.get_tensor(name)


@torch.no_grad()
def load_weights(model: GPT, directory: str | Path) -> None:
    """Copy the weights of a directory into `model`, converted to its element type and device; an adapter stays as it is.

    Raises:
        FileNotFoundError: there is neither `model.safetensors` nor an index of several files, or one of those is missing.
        DirectoryError: a file is damaged, or its tensors are not this model's; nothing has been copied then.
    """
    files = open_weights(model.config, directory)
    state = model.state_dict()
    for name in model.config.tensor_shapes():
        state[name].copy_(files.tensor(name))


def open_weights(config: ModelConfig, directory: str | Path) -> WeightFiles:
    """The tensors of a directory, which are those of the configuration; errors as in `load_weights`."""
    files = WeightFiles(directory)
    files.check(config, equal=lambda one, other: torch.equal(files.tensor(one), files.tensor(other)))
    return files


def load_pretrained(
    directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> GPT:
    """Build the model that `config.json` describes and load its weights; `dtype` None means float32.

    Raises:
        FileNotFoundError: a file is missing.
        DirectoryError: a file is damaged, unsupported or does not fit the other.
    """
    config = load_config(directory)
    with torch.device("cpu"):
        model = GPT(config)
    load_weights(model.to(dtype or torch.float32), directory)
    return model.to(device)
