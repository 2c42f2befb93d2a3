"""Saving and loading a model as a Hugging Face directory, for PyTorch.

Notable: Transformers, mlx-lm, lm-eval and llama.cpp's converter read what is written here without an export step, and a
    Llama or Qwen3 of theirs is read back, in one file or several. Tied weights are written once. Writing is not atomic
    and not flushed to the disk: who needs that writes beside the final name, calls fsync and renames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anarcho_model.config import ModelConfig
from anarcho_model.directory import (
    EMBEDDING,
    HEAD,
    INDEX_FILE,
    WEIGHTS_FILE,
    DirectoryError,
    check_shapes,
    load_config,
    load_stop_token_ids,
    weight_files,
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


class WeightFiles:
    """The tensors of a directory, whether in one file or in several; each is read when it is asked for."""

    def __init__(self, directory: str | Path) -> None:
        """Open the files and read their headers.

        Raises:
            FileNotFoundError: a file is missing.
            DirectoryError: one is damaged, or two hold the same tensor.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name of each tensor -> its shape."""
        self.paths = weight_files(directory)
        self._homes: dict[str, Path] = {}
        for path in self.paths:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if name in self._homes:
                        raise DirectoryError(f"{path} and {self._homes[name]} both hold {name}, expected it once.")
                    self._homes[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU."""
        with _opened(self._homes[name]) as file:
            return file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise DirectoryError(f"{path} is damaged ({error}), expected a safetensors file.") from error


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
    path = files.paths[0] if len(files.paths) == 1 else Path(directory) / INDEX_FILE
    check_shapes(files.shapes, config, path=path)
    redundant = {name: files.tensor(name) for name in (EMBEDDING, HEAD)} if HEAD in files.shapes else {}
    _check_redundant_head(config, redundant, path)
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


def _check_redundant_head(config: ModelConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """A file of tied weights may hold the output layer, too, but only if it says the same."""
    if config.tie_embeddings and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise DirectoryError(
            f"{path} holds an {HEAD} that differs from {EMBEDDING}, expected equal ones because "
            "config.json says tie_word_embeddings; set it to false to load both."
        )
