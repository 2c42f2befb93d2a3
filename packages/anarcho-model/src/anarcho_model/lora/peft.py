"""An adapter as a directory in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Notable: `peft.PeftModel.from_pretrained(base, directory)` reads it. It must not lie beside merged weights: Transformers, where PEFT is
    installed, takes a directory with an `adapter_config.json` for an adapter alone. A directory inside of the model's is not looked at.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from anarcho_model.directory import DirectoryError
from anarcho_model.lora.torch import adapter_parameters
from anarcho_model.torch import GPT

__all__ = ["ADAPTER_CONFIG_FILE", "ADAPTER_FILE", "load_adapter", "save_adapter"]

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(model: GPT, directory: str | Path) -> None:
    """Write the adapter of `model` into `directory`, which is made if missing.

    Raises:
        ValueError: the model has no adapter.
    """
    if model.adapter is None:
        raise ValueError("the model has no adapter; add one before saving it")
    directory, lora = Path(directory), model.adapter.config
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
    tensors = {
        _PREFIX + name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(model).items()
    }
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: GPT, directory: str | Path) -> None:
    """Copy the weights of an adapter of the same settings into that of `model`.

    Raises:
        FileNotFoundError: the file is missing.
        DirectoryError: it is damaged, or its tensors are not those of this adapter; nothing has been copied then.
    """
    path = Path(directory) / ADAPTER_FILE
    parameters = {_PREFIX + name: parameter for name, parameter in adapter_parameters(model).items()}
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found, expected the weights of an adapter.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise DirectoryError(f"{path} is damaged ({error}), expected a safetensors file.") from error
    found, expected = ({name: tuple(t.shape) for name, t in some.items()} for some in (tensors, parameters))
    if found != expected:
        name = min(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        raise DirectoryError(
            f"{path} holds {name} with the shape {found.get(name)}, expected {expected.get(name)}: "
            "it is the adapter of another model, or of other settings of lora."
        )
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
