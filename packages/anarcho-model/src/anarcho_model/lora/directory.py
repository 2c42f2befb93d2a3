"""The directory of an adapter in PEFT's format: its settings, and what is checked before any framework reads a weight.

Notable: `peft.PeftModel.from_pretrained(base, directory)` reads it. It must not lie beside merged weights: Transformers, where PEFT is
    installed, takes a directory with an `adapter_config.json` for an adapter alone. A directory inside of the model's is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from anarcho_model.directory import DirectoryError, opened
from anarcho_model.lora.config import LoraConfig

__all__ = ["ADAPTER_CONFIG_FILE", "ADAPTER_FILE", "PREFIX", "adapter_file", "write_settings"]

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the name of each tensor in the file."""


def write_settings(lora: LoraConfig, directory: Path) -> None:
    """Write `adapter_config.json` into `directory`, which is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": [f"{target}_proj" for target in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def adapter_file(directory: str | Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """The file of weights, which are those of an adapter with these shapes by name.

    Raises:
        FileNotFoundError: the file is missing.
        DirectoryError: it is damaged, or its tensors are not those of this adapter.
    """
    path = Path(directory) / ADAPTER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found, expected the weights of an adapter.")
    expected = {PREFIX + name: tuple(shape) for name, shape in shapes.items()}
    with opened(path, framework="np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if found != expected:
        name = min(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise DirectoryError(
            f"{path} holds {name} with the shape {found.get(name)}, expected {expected.get(name)}: "
            "it is the adapter of another model, or of other settings of lora."
        )
    return path
