"""A run in PyTorch: the model on its device, the optimizer, the loss, and how they are saved; loads torch where it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_model.generate.sampling import SamplingConfig
from anarcho_monitor import read_memory
from anarcho_tokenize import AnyTokenizer

from anarcho_cli.back_ends.run_model import RunModel
from anarcho_cli.back_ends.settings import require_fitting, training_draws
from anarcho_cli.back_ends.torch_processes import require_devices, shared_out
from anarcho_cli.config import RunConfig
from anarcho_cli.freed_memory import keep_freed_memory, return_freed_memory
from anarcho_cli.output import note
from anarcho_cli.plan import plan_run
from anarcho_cli.preloading import load_beside

if TYPE_CHECKING:
    from anarcho_model.torch import GPT
    from anarcho_train import Ranks
    from anarcho_train.steps.torch import TorchStep

    from anarcho_cli.back_ends import TrainingStep

NAME: str = "torch"


def require_supported(config: RunConfig, device: str) -> None:
    """Refuses an arithmetic that the device does not have; where there is nothing to refuse, PyTorch is loaded beside what follows."""
    always = device == "cpu" and config.train.precision != "float16" and not (config.train.lean or config.train.float8)
    if always and "torch" not in sys.modules:
        load_beside("torch", "anarcho_model.torch", "anarcho_optim.torch", "anarcho_train.steps.torch")
        return
    import torch
    from anarcho_train.steps.torch_settings import resolve_precision

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        require_devices(device)
        for key in ("lean", "update_in_backward"):
            if getattr(config.train, key):
                raise ValueError(f"train.{key} is true with several processes; expected false, or one process")
    precision = resolve_precision(config.train.precision, torch.device(device))
    if config.train.lean and precision != torch.bfloat16:
        raise ValueError(
            f"train.lean is true, but train.precision 'auto' is {precision} on this {device}; "
            "expected false, or train.precision = 'bfloat16'"
        )
    if config.train.float8:
        from anarcho_model.layers.torch_float8 import obstacle

        if found := obstacle(config.model, torch.device(device)):
            raise ValueError(f"train.float8 is true, but {found}, or false")


def limit_memory(device: str) -> None:
    """On a CPU, makes freed memory go back to the system, until a compiled step is made; what exceeds its device PyTorch ends by itself."""
    if device == "cpu":
        return_freed_memory()


def make_step(
    config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str, ranks: Ranks | None = None
) -> TorchStep:
    """As `BackEnd.make_step`."""
    import torch
    from anarcho_model import weights
    from anarcho_model.lora import peft
    from anarcho_model.lora import torch as lora
    from anarcho_model.torch import GPT
    from anarcho_optim.memory import CUDA_SCRATCH_BYTES
    from anarcho_optim.torch import MuonAdamW, param_groups
    from anarcho_train.losses.torch_preference import PreferenceLoss
    from anarcho_train.steps.torch import TorchStep
    from anarcho_train.steps.torch_ranks import TorchRanks
    from anarcho_train.steps.torch_settings import resolve_compile

    require_fitting(config, tokenizer)
    flops = config.flops_per_token * config.total_tokens
    if device == "cpu" and resolve_compile(config.train.compile, torch.device(device), flops=flops):
        keep_freed_memory()
    torch.manual_seed(config.train.seed)  # Nothing is drawn from it; but checkpoints hold it, and are to be equal.
    model = GPT(config.model)
    own = RunModel(config=config, tokenizer=tokenizer, base=base, weights=weights, lora=lora, peft=peft)
    own.prepare(model)
    if config.train.lean:
        model.to(torch.bfloat16)
    ranks = ranks if isinstance(ranks, TorchRanks) else TorchRanks()
    shards = shared_out(model, config, ranks, device=device) if ranks.size > 1 else None
    if shards is None:
        model.to(device)
        ranks.join_devices(next(model.parameters()).device)
    optimizer = MuonAdamW(
        own.groups(model, routing=param_groups),
        process_group=None if shards else ranks.computing,
        cuda_scratch_bytes=plan_run(config, device=device).memory.optimizer_scratch or CUDA_SCRATCH_BYTES,
        state_dtype=torch.bfloat16 if config.train.lean else torch.float32,
        stochastic_rounding=config.train.lean,
    )
    return TorchStep(
        model,
        optimizer,
        config=config.train,
        loss=PreferenceLoss(config.preference) if config.data.kind == "preference" else None,
        draws=training_draws(config),
        save_model=own.save,
        load_model=own.load,
        begin=_beginning(model, own),
        flops=flops,
        ranks=ranks,
        shards=shards,
        notify=note,
    )


def generate(step: TrainingStep, prompt: Sequence[int], *, config: SamplingConfig) -> Iterator[int]:
    """As `BackEnd.generate`; an adapter is merged for good. Of a model in shards, a copy on the CPU writes."""
    from anarcho_model.generate.torch import generate as continuation
    from anarcho_model.lora.torch import merge_adapter
    from anarcho_train.steps.torch import TorchStep

    model: Any = step.whole_model() if isinstance(step, TorchStep) else step.model
    merge_adapter(model)
    return continuation(model, prompt, config=config)


def gauges(step: TrainingStep, device: str) -> Mapping[str, float]:
    """The memory of device, process and system."""
    return read_memory(device).metrics()


def device_name(device: str) -> str:
    """The full name of a CUDA device; other devices have no peak that their name tells."""
    if device != "cuda":
        return device
    import torch

    return torch.cuda.get_device_name()


def _beginning(model: GPT, own: RunModel) -> Callable[[Any], None]:
    """Gives the model the weights that it has now; an adapter's are few enough to be kept, the others are made anew."""
    import torch
    from anarcho_model.lora.torch import adapter_parameters

    first = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}

    @torch.no_grad()
    def begin(model: GPT) -> None:
        if not first:
            own.set_first_weights(model)
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(first[name])

    return begin
