"""Several processes of one run in PyTorch: how they meet, which device each has, and whether the model is whole in each.

Notable: torchrun's processes take the CUDA device of their number on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from anarcho_cli.config import RunConfig
from anarcho_cli.fitting.budget import USED_SHARE, memory_budget
from anarcho_cli.output import bytes_text, note
from anarcho_cli.plan import Processes, plan_run

if TYPE_CHECKING:
    from anarcho_model.torch import GPT
    from anarcho_train import Ranks
    from anarcho_train.steps.torch_ranks import TorchRanks
    from anarcho_train.steps.torch_shards import Shards


Strategy = Literal["ddp", "fsdp", "hybrid"]
"""How processes share a model, as `train.strategy`."""


class ProcessesError(ValueError):
    """Processes that cannot train together on their devices; the message is one sentence for the user."""


def connect(*, timeout_seconds: float) -> TorchRanks:
    """The processes that torchrun has started, this one among them; raises `RankLost` where they do not find each other."""
    import torch
    import torch.distributed as dist
    from anarcho_train import RankLost
    from anarcho_train.steps.torch_ranks import TorchRanks

    try:
        timeout = timedelta(seconds=timeout_seconds)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # Where torchrun keeps the store when it starts processes again, there are the addresses of those before.
        fresh = dist.PrefixStore(f"attempt-{_number(os.environ, 'TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankLost(
            f"the other processes of this run cannot be reached at {place} ({' '.join(str(error).split())[:160]}); see that torchrun "
            "names the right address and that no firewall is between them"
        ) from error
    local = _number(os.environ, "LOCAL_RANK", 0)
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    return TorchRanks(dist.group.WORLD, timeout_seconds=timeout_seconds)


def require_devices(device: str) -> None:
    """Raises `ProcessesError` where this process has no device of its own of this type."""
    import torch

    if device == "cpu":
        return
    if device != "cuda":
        raise ProcessesError(f"several processes train on --device cpu or cuda, not on {device}; start one process")
    local, count = _number(os.environ, "LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise ProcessesError(
            f"process {local} of this machine has no GPU of its own, there are {count}; start at most {count} on it"
        )


def shared_out(model: GPT, config: RunConfig, ranks: TorchRanks, *, device: str) -> Shards | None:
    """The model in shards where the configuration says so or it fits no device whole; None where each process has all of it."""
    import torch
    from anarcho_train.steps.torch_settings import resolve_precision
    from anarcho_train.steps.torch_shards import Shards

    strategy, machines = _agreed_strategy(config, ranks, device=device, notify=note)
    replicas = replicas_of(machines) if strategy == "hybrid" else 1
    if strategy == "ddp" or replicas == ranks.size:
        return None
    place = torch.device(device)
    compute = resolve_precision(config.train.precision, place)
    if compute == torch.float16:
        raise ProcessesError(
            f"train.precision is {config.train.precision}, here float16, which does not go with train.strategy = '{strategy}'; use "
            "bfloat16 or float32"
        )
    return Shards(model, list(model.model.layers), ranks, device=place, replicas=replicas, compute=compute)


def processes_of(config: RunConfig, ranks: Ranks, *, device: str) -> Processes:
    """What there is to be planned for: the ranks, as `shared_out` will share the model among them."""
    strategy, machines = _agreed_strategy(config, ranks, device=device)
    return Processes(count=ranks.size, machines=len(machines) if len(set(machines)) == 1 else 1, strategy=strategy)


def smallest_strategy(needed: int, budget: int, *, machines: Sequence[int]) -> Strategy:
    """What moves the least between machines of so many processes each, where one needs ``needed`` bytes alone and has ``budget``."""
    if needed <= budget:
        return "ddp"
    together = len(machines) > 1 and len(set(machines)) == 1 and machines[0] > 1
    return "hybrid" if together and needed / machines[0] <= budget else "fsdp"


def fitting_strategy(config: RunConfig, budget_bytes: int, *, machines: Sequence[int], device: str) -> Strategy:
    """What `auto` is where each process may hold so many bytes."""
    return smallest_strategy(_needed_bytes(config, device), int(USED_SHARE * budget_bytes), machines=machines)


def _needed_bytes(config: RunConfig, device: str) -> int:
    memory = plan_run(config, device=device).memory
    return memory.weights + memory.gradients + memory.optimizer + memory.optimizer_scratch


def _agreed_strategy(
    config: RunConfig, ranks: Ranks, *, device: str, notify: Callable[[str], None] = lambda message: None
) -> tuple[Strategy, list[int]]:
    """The strategy, the same in all processes, and how many each machine has."""
    machines = processes_by_machine(ranks, os.environ)
    if config.train.strategy != "auto":
        return config.train.strategy, machines
    here = 1 if device == "cuda" else _number(os.environ, "LOCAL_WORLD_SIZE", 1)
    budget = int(ranks.gathered([memory_budget("torch", device) // here]).min())
    strategy = fitting_strategy(config, budget, machines=machines, device=device)
    if strategy != "ddp":
        notify(
            f"weights, gradients and optimizer state take {bytes_text(_needed_bytes(config, device))}, and a process has "
            f"{bytes_text(int(USED_SHARE * budget))} for them: they are shared out ({strategy})"
        )
    return strategy, machines


def processes_by_machine(ranks: Ranks, environ: Mapping[str, str]) -> list[int]:
    """How many each has, in the order of their numbers: torchrun says which machine this is, and numbers machine by machine."""
    local = _number(environ, "LOCAL_WORLD_SIZE", 1)
    machine = _number(environ, "GROUP_RANK", ranks.rank // local)
    told = ranks.gathered([machine])[:, 0].tolist()
    return [len(list(group)) for _, group in groupby(told)]


def replicas_of(machines: Sequence[int]) -> int:
    """One for each machine, all of which have as many processes."""
    if len(set(machines)) > 1:
        raise ProcessesError(
            f"train.strategy is hybrid, but the machines have {', '.join(map(str, machines))} processes; start as many on each, or use "
            "train.strategy = 'fsdp'"
        )
    return len(machines)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else default
