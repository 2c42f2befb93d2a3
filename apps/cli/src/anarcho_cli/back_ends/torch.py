"""A run in PyTorch: the model on its device, the optimizer, the loss, and how they are saved; loads torch where it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_model.generate.sampling import SamplingConfig
from anarcho_monitor import read_memory
from anarcho_tokenize import AnyTokenizer

from anarcho_cli.back_ends.settings import ADAPTER, adapter_groups, require_fitting, special_tokens, training_draws
from anarcho_cli.config import RunConfig
from anarcho_cli.output import note

if TYPE_CHECKING:
    from anarcho_model.torch import GPT
    from anarcho_train import Ranks
    from anarcho_train.steps.torch import TorchStep

    from anarcho_cli.back_ends import TrainingStep

NAME: str = "torch"


def require_supported(config: RunConfig, device: str) -> None:
    """Refuses an arithmetic that the device does not have."""
    import torch
    from anarcho_train.steps.torch import resolve_precision

    resolve_precision(config.train.precision, torch.device(device))


def limit_memory(device: str) -> None:
    """PyTorch ends what exceeds its device by itself."""


def make_step(
    config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str, ranks: Ranks | None = None
) -> TorchStep:
    """As `BackEnd.make_step`."""
    import torch
    from anarcho_model.torch import GPT
    from anarcho_optim.torch import MuonAdamW
    from anarcho_train.losses.torch_preference import PreferenceLoss
    from anarcho_train.steps.torch import TorchStep

    require_fitting(config, tokenizer)
    torch.manual_seed(config.train.seed)  # Nothing is drawn from it; but checkpoints hold it, and are to be equal.
    model = GPT(config.model)
    _set_first_weights(model, config, base)
    if config.lora.rank:
        from anarcho_model.lora.torch import add_adapter

        add_adapter(model, config.lora, seed=config.train.seed)
    model.gradient_checkpointing = config.train.gradient_checkpointing is True
    model.to(device)
    return TorchStep(
        model,
        MuonAdamW(_groups(model, config)),
        config=config.train,
        loss=PreferenceLoss(config.preference) if config.data.kind == "preference" else None,
        draws=training_draws(config),
        save_model=lambda trained, directory: _save_model(trained, directory, config, tokenizer),
        load_model=_load_model,
        begin=_beginning(model, config, base),
        flops=config.flops_per_token * config.total_tokens,
        notify=note,
    )


def generate(step: TrainingStep, prompt: Sequence[int], *, config: SamplingConfig) -> Iterator[int]:
    """As `BackEnd.generate`; an adapter is merged for good."""
    from anarcho_model.generate.torch import generate as continuation
    from anarcho_model.lora.torch import merge_adapter

    merge_adapter(step.model)
    return continuation(step.model, prompt, config=config)


def gauges(step: TrainingStep, device: str) -> Mapping[str, float]:
    """The memory of device, process and system."""
    return read_memory(device).metrics()


def device_name(device: str) -> str:
    """The full name of a CUDA device; other devices have no peak that their name tells."""
    if device != "cuda":
        return device
    import torch

    return torch.cuda.get_device_name()


def _set_first_weights(model: GPT, config: RunConfig, base: Path) -> None:
    """The weights of the directory ``base`` where that is there, else random ones."""
    from anarcho_model.weights import load_weights

    if base.is_dir():
        load_weights(model, base)
    else:
        model.init_weights(seed=config.train.seed, init=config.init)


def _beginning(model: GPT, config: RunConfig, base: Path) -> Callable[[Any], None]:
    """Gives the model the weights that it has now; an adapter's are few enough to be kept, the others are made anew."""
    import torch
    from anarcho_model.lora.torch import adapter_parameters

    first = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}

    @torch.no_grad()
    def begin(model: GPT) -> None:
        if not first:
            _set_first_weights(model, config, base)
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(first[name])

    return begin


def _groups(model: GPT, config: RunConfig) -> Any:
    """The groups of the optimizer; an adapter's thin matrices are Muon's only if the configuration says so."""
    from anarcho_model.lora.torch import adapter_parameters
    from anarcho_optim.torch import param_groups

    return adapter_groups(config, adapter_parameters(model).items()) or param_groups(model, config=config.optim)


def _save_model(model: Any, directory: Path, config: RunConfig, tokenizer: AnyTokenizer) -> None:
    """A model directory that is whole in itself; an adapter, which is merged into its weights, lies in a folder of its own, too."""
    from anarcho_model.lora.peft import save_adapter
    from anarcho_model.weights import save_pretrained

    save_pretrained(model, directory, **special_tokens(config, tokenizer))
    tokenizer.save(directory)
    if model.adapter is not None:
        save_adapter(model, directory / ADAPTER)


def _load_model(model: Any, directory: Path) -> None:
    """What is trained: all weights, or those of the adapter, since the base's are there already."""
    from anarcho_model.lora.peft import load_adapter
    from anarcho_model.weights import load_weights

    if model.adapter is None:
        load_weights(model, directory)
    else:
        load_adapter(model, directory / ADAPTER)
