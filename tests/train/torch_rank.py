"""One of several ranks of PyTorch, as what a process runs: the steps of a small training, some of them with a fault, and what came of them.

Each rank leaves ``rank-N.json`` in the directory: a list of what happened by the name of the case.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from anarcho_train import OutOfMemory, RankLost, StepSchedule, TrainConfig
from anarcho_train.rank_speeds import RankSpeeds
from anarcho_train.steps import torch_shards
from anarcho_train.steps.torch import TorchStep
from anarcho_train.steps.torch_ranks import TorchRanks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

RANK = "__torch_rank__"
MICRO = 2
SILENT_SECONDS = 1.0
SLOW_SECONDS = 0.2


class Layers(nn.Module):
    """A model with enough parameters for two buckets of gradients, whose backward pass can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.hidden = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 40_000)
        self.head = nn.Linear(8, 13, bias=False)
        self.fails: Callable[[], None] = lambda: None
        self.pauses: Callable[[str], None] = lambda where: None
        """Called between its larger layers, in `forward` and in `backward`."""

    def token_logprobs(self, tokens: torch.Tensor, targets: torch.Tensor, **_: Any) -> torch.Tensor:
        embedded = self.embedding(tokens)
        if embedded.requires_grad:
            embedded.register_hook(lambda gradient: self.fails())
        hidden = self.hidden(embedded).tanh()
        self.pauses("forward")
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.pauses("backward"))
        logits = self.head(hidden + 1e-3 * self.wide(hidden)[..., :8])
        return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


class Traffic(TorchDispatchMode):
    """Counts the bytes that each rank hands over, by what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gather": 0, "reduce": 0}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.namespace == "c10d" and isinstance(arguments[1], torch.Tensor):  # Numbers of the host are lists.
            self.bytes["reduce" if "scatter" in str(function) else "gather"] += arguments[1].nbytes
        return function(*arguments, **(named or {}))


def make_step(ranks: TorchRanks, *, replicas: int = 0, precision: str = "float32") -> TorchStep:
    """A step of the model whole in each rank, or in shards, of which there are so many ``replicas``."""
    torch.manual_seed(0)
    model = Layers()
    shards = None
    if replicas:
        blocks = [model.hidden, model.wide]
        options = {"replicas": replicas, "compute": getattr(torch, precision)}
        shards = torch_shards.Shards(model, blocks, ranks, device=torch.device("cpu"), **options)
    return TorchStep(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        config=TrainConfig(precision=precision, compile="off"),
        save_model=lambda model, directory: None,
        load_model=lambda model, directory: None,
        ranks=ranks,
        shards=shards,
    )


def share(number: int, ranks: TorchRanks, *, broken: bool = False, micro: int = MICRO) -> list[Any]:
    """This rank's micro-batches of eight rows, contiguous; where the step is broken, a weight of the last row is no number."""
    from types import SimpleNamespace

    tokens = (np.arange(8)[:, None] * 5 + np.arange(4) + number) % 13
    weights = np.ones(tokens.shape, np.float32)
    weights[1, 2:] = 0
    weights[-1, 0] = np.nan if broken else 1
    rows = {"tokens": tokens.astype(np.int32), "targets": ((tokens + 1) % 13).astype(np.int32), "weights": weights}
    count = len(tokens) // ranks.size
    starts = range(ranks.rank * count, (ranks.rank + 1) * count, micro)
    parts = [{name: array[start : start + micro] for name, array in rows.items()} for start in starts]
    return [SimpleNamespace(**part, positions=None, segments=None) for part in parts]


@contextmanager
def no_memory(step: TorchStep, *, where: str):
    """Memory runs out in the second half of this rank's step: in a forward pass, or in the last backward pass when others exchange."""
    calls = [0]

    def fail() -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    model: Any = step.model
    own = model.token_logprobs

    def forward(*arguments: Any, **named: Any) -> torch.Tensor:
        fail()
        return own(*arguments, **named)

    if where == "forward":
        step._passes.logprobs = forward
    else:
        model.fails = fail
    try:
        yield
    finally:
        step._passes.logprobs, model.fails = own, lambda: None


def train(ranks: TorchRanks) -> dict[str, Any]:
    """Four steps, the third of them broken; between them the second is tried with too little memory in the last rank."""
    step, found = make_step(ranks), []
    for number in range(4):
        schedule = StepSchedule(lr_scale=1 / (number + 1), number=number, measure_update=number == 1)
        if number == 1 and ranks.size > 1:
            for where in ("forward", "backward"):
                tried = "nothing was raised"
                try:
                    if ranks.rank == ranks.size - 1:
                        with no_memory(step, where=where):
                            step.train(share(number, ranks), schedule=schedule)
                    else:
                        step.train(share(number, ranks), schedule=schedule)
                except OutOfMemory as error:
                    tried = f"{error}, torn {error.torn}"
                found.append(tried)
        found.append(asdict(step.train(share(number, ranks, broken=number == 2), schedule=schedule)))
    weights = [float(p.detach().double().sum()) for p in step.model.parameters()]
    return {"steps": found, "weights": weights}


PLACES = [(where, micro_batch) for where in ("forward", "backward") for micro_batch in (1, 2)]
"""Where memory runs out in one rank: between its larger layers, in the first or the last micro-batch."""


def without_memory(step: TorchStep, parts: list[Any], schedule: Any, place: tuple[str, int], *, alone: bool) -> str:
    """What a step raises in which one rank, this one if ``alone``, finds no memory at a place."""
    model: Any = step.model
    calls: list[str] = []

    def pauses(where: str) -> None:
        calls.append(where)
        if where == place[0] and calls.count(where) == place[1]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    if alone:
        model.pauses = pauses
    try:
        step.train(parts, schedule=schedule)
    except OutOfMemory as error:
        return f"{error}, torn {error.torn}"
    finally:
        model.pauses = lambda where: None
    return "nothing was raised"


def train_in_shards(ranks: TorchRanks, *, replicas: int, held: bool) -> dict[str, Any]:
    """Three steps of a model in shards, whose gradients are ``held`` whole between micro-batches or not."""
    torch_shards.HELD_GRADIENTS_SHARE = 0.1 if held else -1.0
    step = make_step(ranks, replicas=replicas)
    found, told = [], []
    for number in range(3):
        schedule = StepSchedule(lr_scale=1 / (number + 1), number=number, measure_update=number == 1)
        for place in PLACES if number == 1 else ():
            told.append(without_memory(step, share(number, ranks, micro=1), schedule, place, alone=ranks.rank == 3))
        found.append(asdict(step.train(share(number, ranks, micro=1), schedule=schedule)))
    own = sum(parameter.to_local().numel() for parameter in step.model.parameters())
    counted = float(step._parts.sum(torch.tensor(float(own))))
    whole = step.whole_model() if ranks.rank == 0 else step.model
    ranks.gathered([0.0])  # The others take part in what the first one reads.
    sums = [float(p.detach().double().sum()) for p in whole.parameters()] if ranks.rank == 0 else []
    return {"steps": found, "weights": sums, "counted": counted, "told": told}


def train_in_bfloat16(ranks: TorchRanks) -> dict[str, Any]:
    """Steps under autocast of a model in shards, or in one process whole; and what a step of each precision sends."""
    step = make_step(ranks, replicas=int(ranks.size > 1), precision="bfloat16")
    schedules = [StepSchedule(lr_scale=1 / (number + 1), number=number) for number in range(3)]
    found = [asdict(step.train(share(s.number, ranks, micro=1), schedule=s)) for s in schedules]
    if ranks.size == 1:
        return {"steps": found}
    sent = {}
    for name, other in (("float32", make_step(ranks, replicas=1)), ("bfloat16", step)):
        other.train(share(0, ranks), schedule=schedules[0])  # The first step has passes of its own.
        with Traffic() as traffic:
            other.train(share(0, ranks), schedule=schedules[0])
        sent[name] = traffic.bytes
    types = [str(parameter.dtype) for parameter in step.model.parameters()]
    return {"steps": found, "sent": sent, "types": sorted(set(types))}


def slowness(ranks: TorchRanks) -> list[float]:
    """This rank's own seconds of steps in whose last backward pass the last rank is slow."""
    step, speeds = make_step(ranks), RankSpeeds()
    model: Any = step.model
    if ranks.rank == ranks.size - 1:
        model.fails = lambda: time.sleep(SLOW_SECONDS)
    found = []
    for number in range(4):
        with speeds.stepping(ranks):
            step.train(share(number, ranks, micro=4), schedule=StepSchedule(lr_scale=1.0, number=number))
        found.append(speeds.to_tell()[0])
    return found


def silence(rank: int) -> dict[str, Any]:
    """Rank 1 says nothing for longer than rank 0 waits; every later exchange of rank 0 fails at once."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENT_SECONDS))
    ranks = TorchRanks(group, timeout_seconds=SILENT_SECONDS)
    if rank:
        time.sleep(3 * SILENT_SECONDS)
        return {}
    messages, began = [], time.monotonic()
    for _ in range(2):
        try:
            ranks.gathered([1.0])
        except RankLost as error:
            messages.append(str(error))
    return {"messages": messages, "seconds": time.monotonic() - began}


def unbroken() -> dict[str, Any]:
    """What `train_in_shards` does, in one process."""
    step, found = make_step(TorchRanks()), []
    for number in range(3):
        schedule = StepSchedule(lr_scale=1 / (number + 1), number=number, measure_update=number == 1)
        found.append(asdict(step.train(share(number, TorchRanks()), schedule=schedule)))
    weights = [float(p.detach().double().sum()) for p in step.model.parameters()]
    return {"steps": found, "weights": weights, "counted": sum(p.numel() for p in step.model.parameters())}


def main(rank: int, size: int, directory: str) -> None:
    torch.set_num_threads(1)
    if size == 1:
        alone = TorchRanks()
        outcome = {"trained": train(alone), "unbroken": unbroken(), "bfloat16": train_in_bfloat16(alone)}
    else:
        rendezvous = f"file://{directory}/rendezvous-{size}"
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=timedelta(seconds=30)
        )
        ranks = TorchRanks(dist.group.WORLD, timeout_seconds=30)
        if size == 2:
            outcome = {"trained": train(ranks), "slowness": slowness(ranks), "silence": silence(rank)}
        else:
            cases = [(replicas, held) for replicas in (1, 2) for held in (True, False)]
            outcome: dict[str, Any] = {
                f"{replicas}-{held}": train_in_shards(ranks, replicas=replicas, held=held) for replicas, held in cases
            }
            outcome["bfloat16"] = train_in_bfloat16(ranks)
    (Path(directory) / f"rank-{size}-{rank}.json").write_text(json.dumps(outcome))


if __name__ == RANK:
    main(*globals()["TOLD"])
    sys.stdout.flush()
