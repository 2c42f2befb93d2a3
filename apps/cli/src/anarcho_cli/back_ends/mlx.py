"""A run in MLX: the model, the optimizer, the loss, and how they are saved; loads mlx where it is called, and never torch.

Notable, of MLX on an Apple GPU:

* Memory is the machine's own, so MLX is told to stay below what Metal recommends; by its defaults it may take half as much
  again, and keep as much of what was freed. How much is wired stays as the system has it: raised, it can starve the system.
* A command's buffers and one evaluation's arrays are limited in number (499000): the step evaluates each micro-batch by itself.
* Compiled functions are kept for good, one for each shape of a batch. Texts and conversations have one shape, pairs of
  answers at most as many as the ladder of lengths in their shards; ``traces`` in the metrics counts what was compiled.
* A command that runs for seconds may be ended by the system while it drives a display: smaller micro-batches are shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_model.generate.sampling import SamplingConfig
from anarcho_monitor import read_memory
from anarcho_tokenize import AnyTokenizer

from anarcho_cli.back_ends.run_model import RunModel
from anarcho_cli.back_ends.settings import require_fitting, training_draws
from anarcho_cli.config import RunConfig
from anarcho_cli.output import note

if TYPE_CHECKING:
    from anarcho_model.mlx import GPT
    from anarcho_train import Ranks
    from anarcho_train.steps.mlx import MlxStep
    from anarcho_train.steps.mlx_ranks import MlxRanks

    from anarcho_cli.back_ends import TrainingStep

NAME: str = "mlx"

MEMORY_SHARE = 0.85
"""Of the device's memory, where that is all there is; the rest is the system's and other programs'."""
CACHE_SHARE = 0.5
"""Of the limit, for freed buffers of a GPU that are kept: a step uses most of them again, other shapes do not."""


def require_supported(config: RunConfig, device: str) -> None:
    """Refuses an arithmetic that the device, or this framework, does not have."""
    import mlx.core as mx
    from anarcho_train.steps.mlx_settings import resolve_precision

    if config.train.lean:
        raise ValueError("train.lean is true, which MLX does not have; expected false, or --backend torch")
    if config.train.float8:
        raise ValueError("train.float8 is true, which MLX does not have; expected false, or --backend torch")
    if config.train.update_in_backward:
        raise ValueError(
            "train.update_in_backward is true, which MLX does not have; expected false, or --backend torch"
        )
    _use(device)
    resolve_precision(config.train.precision, mx.default_device())


def limit_memory(device: str) -> None:
    """Tells MLX how much it may take and how much of what was freed it may keep; beyond that, it waits, frees, and then fails."""
    import mlx.core as mx
    from anarcho_train.steps.mlx_memory import bound_waiting_buffers

    bound_waiting_buffers()
    _use(device)
    limit = memory_limit(mx.device_info(), total=read_memory("mlx").system_total_bytes)
    mx.set_memory_limit(limit)
    if device != "cpu":  # There, MLX keeps 32 MiB, and the C library its own.
        mx.set_cache_limit(int(CACHE_SHARE * limit))


def memory_limit(device: Mapping[str, Any], *, total: int) -> int:
    """Bytes that MLX may take: what Metal recommends, else a share of the device's memory, or of the machine's ``total``."""
    recommended = device.get("max_recommended_working_set_size")
    if recommended:
        return min(int(recommended), total)
    return int(MEMORY_SHARE * int(device.get("total_memory") or total))


def connect(transport: str, *, timeout_seconds: float) -> MlxRanks:
    """The processes that `mlx.launch` has started, this one among them; raises `RankLost` where they do not find each other."""
    import mlx.core as mx
    from anarcho_train import RankLost
    from anarcho_train.steps.mlx_ranks import MlxRanks

    try:
        group = mx.distributed.init(strict=True, backend=transport)
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            f"the other processes of this run cannot be reached over {transport} ({error}); see that mlx.launch names the right "
            "addresses and that no firewall is between them"
        ) from error
    return MlxRanks(group, timeout_seconds=timeout_seconds, device=mx.gpu if transport == "nccl" else mx.cpu)


def make_step(
    config: RunConfig, tokenizer: AnyTokenizer, base: Path, *, device: str, ranks: Ranks | None = None
) -> MlxStep:
    """As `BackEnd.make_step`."""
    import mlx.core as mx
    from anarcho_model import weights_mlx
    from anarcho_model.lora import mlx as lora
    from anarcho_model.lora import peft_mlx
    from anarcho_model.mlx import GPT
    from anarcho_optim.mlx import MuonAdamW, param_groups
    from anarcho_train.losses.mlx_preference import PreferenceLoss
    from anarcho_train.steps.mlx import MlxStep
    from anarcho_train.steps.mlx_ranks import MlxRanks

    require_fitting(config, tokenizer)
    _use(device)
    mx.random.seed(config.train.seed)  # Nothing is drawn from it; but checkpoints hold it, and are to be equal.
    model = GPT(config.model)
    own = RunModel(config=config, tokenizer=tokenizer, base=base, weights=weights_mlx, lora=lora, peft=peft_mlx)
    own.prepare(model)
    return MlxStep(
        model,
        MuonAdamW(own.groups(model, routing=param_groups)),
        config=config.train,
        loss=PreferenceLoss(config.preference) if config.data.kind == "preference" else None,
        draws=training_draws(config),
        save_model=own.save,
        load_model=own.load,
        begin=_beginning(model, own),
        flops=config.flops_per_token * config.total_tokens,
        ranks=ranks if isinstance(ranks, MlxRanks) else None,
        notify=note,
    )


def generate(step: TrainingStep, prompt: Sequence[int], *, config: SamplingConfig) -> Iterator[int]:
    """As `BackEnd.generate`; an adapter is merged for good."""
    from anarcho_model.generate.mlx import generate as continuation
    from anarcho_model.lora.mlx import merge_adapter

    merge_adapter(step.model)
    return continuation(step.model, prompt, config=config)


def gauges(step: TrainingStep, device: str) -> Mapping[str, float]:
    """The memory of MLX, process and system, and how many functions were compiled."""
    return {**read_memory("mlx").metrics(), "traces": getattr(step, "traces", 0)}


def device_name(device: str) -> str:
    """The full name of the GPU; a CPU has no peak that its name tells."""
    import mlx.core as mx

    return device if device == "cpu" else str(mx.device_info().get("device_name", device))


def _use(device: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)


def _beginning(model: GPT, own: RunModel) -> Callable[[Any], None]:
    """Gives the model the weights that it has now; an adapter's are few enough to be kept, the others are made anew."""
    first = None if model.adapter is None else model.trainable_parameters()

    def begin(model: GPT) -> None:
        if first is None:
            own.set_first_weights(model)
        else:
            model.update(first)

    return begin
