"""The model whole in each process: one alone, or several whose gradients DistributedDataParallel averages.

Notable: gradients travel in the last backward pass of a step alone, while it goes on. Whoever finds no memory in it sends zeros for what
it has not sent yet, or the others would wait for that for ever; the step is then dropped by all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from anarcho_train.out_of_memory import is_out_of_memory
from anarcho_train.steps.agreement import agreed_memory
from anarcho_train.steps.files import OPTIMIZER_FILE
from anarcho_train.steps.torch_files import StateFile
from anarcho_train.steps.torch_ranks import TorchRanks
from anarcho_train.steps.torch_state import own_part
from anarcho_train.steps.torch_waiting import Waited


class Replicas:
    """How a step's gradients come about where each process has the whole model."""

    shared = False
    """Whether a forward pass needs all processes."""

    def __init__(
        self, model: nn.Module, ranks: TorchRanks, *, logprobs: Callable[..., Tensor], in_parts: bool = False
    ) -> None:
        """``logprobs`` is what trains ``model``, however it is compiled: ``in_parts``, if that saves memory, or whole."""
        self._model, self._ranks, self._logprobs = model, ranks, logprobs
        wanted = in_parts or getattr(model, "gradient_checkpointing", False)
        self._compiles_parts = wanted and hasattr(model, "compile_parts")
        self._sent, self._waited = 0, Waited(next(model.parameters()).device)
        self._averaged: DistributedDataParallel | None = None

    def compiled(self, logprobs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function compiled, for batches of a few shapes; where memory is to be saved, in parts."""
        # Cut into the buckets of its gradients, the model could not have operators of its own.
        torch._dynamo.config.optimize_ddp = False
        if self._compiles_parts:
            self._model.compile_parts()  # type: ignore[operator]
            return logprobs
        return torch.compile(logprobs, dynamic=False)

    def leave_compilation(self) -> None:
        """The model is as it was."""
        if self._compiles_parts:
            self._model.compile_parts(None)  # type: ignore[operator]

    def padded(self, micro_batches: Sequence[Any], most: int) -> list[tuple[Any, float]]:
        """The micro-batches, each with what its loss counts."""
        return [(batch, 1.0) for batch in micro_batches]

    def __call__(self, *arguments: Any, **tensors: Any) -> Tensor:
        """Log-probabilities whose gradient is to be trained with."""
        return (self._wrapped() or self._logprobs)(*arguments, **tensors)

    def agreed(self) -> AbstractContextManager[None]:
        """Memory that runs out in the block is known to all ranks at its end."""
        return agreed_memory(self._ranks)

    def local(self) -> AbstractContextManager[None]:
        """Forward and backward passes whose gradients stay here for now."""
        wrapped = self._wrapped()
        return nullcontext() if wrapped is None else wrapped.no_sync()

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """The last backward pass, after which all ranks have the mean of their gradients."""
        self._sent = 0
        try:
            yield
        except Exception as error:
            if self._averaged is not None and is_out_of_memory(error):
                self._send_zeros(self._averaged)
            raise
        if self._averaged is not None:
            self._ranks.waited_seconds += self._waited.end()

    def evaluating(self) -> AbstractContextManager[None]:
        """A forward pass that is nobody else's business."""
        return nullcontext()

    def renew(self) -> None:
        """Begins anew with the next step, after one that all ranks have broken off."""
        if self._averaged is not None:
            self._averaged.reducer._remove_autograd_hooks()
            self._averaged = None

    def whole_model(self) -> nn.Module:
        """The model itself."""
        return self._model

    writes_all = True
    """Whether this process writes what is of no process alone."""

    def state_file(self, tensors: Mapping[str, Tensor], *, copy: bool) -> StateFile:
        """The whole state of the optimizer, contiguous on the CPU."""
        found, _ = own_part(tensors, first_process=True, copy=copy)
        return StateFile(name=OPTIMIZER_FILE, tensors=found)

    def change(self, change: Callable[[nn.Module], None]) -> None:
        """Lets a function set the model's weights."""
        change(self._model)

    def sum(self, numbers: Tensor) -> Tensor:
        """Sums over what other processes hold of the same tensors, which is nothing."""
        return numbers

    def _wrapped(self) -> DistributedDataParallel | None:
        """What averages gradients, made where all ranks train; nothing in a process alone."""
        if self._averaged is None and self._ranks.size > 1:
            with self._ranks.watched(), warnings.catch_warnings():
                # Later releases have another name for `broadcast_buffers`, which earlier ones do not know.
                warnings.simplefilter("ignore", FutureWarning)
                self._averaged = DistributedDataParallel(
                    _Forward(self._model, self._logprobs),
                    process_group=self._ranks.computing,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
            # Without annotations, which it would compare with classes.
            self._averaged.register_comm_hook(self._ranks.computing, lambda group, bucket: self._send(group, bucket))
        return self._averaged

    def _send(self, group: Any, bucket: Any) -> Any:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self._sent += 1
        self._waited.mark()
        return allreduce_hook(group, bucket)

    def _send_zeros(self, averaged: DistributedDataParallel) -> None:
        """The part of a rank that has given up in the exchange that others have begun: as in `torch.distributed.algorithms.join`."""
        with self._ranks.watched():
            buckets = averaged.reducer._get_zeros_like_grad_buckets()
            for bucket in buckets[self._sent :]:
                averaged.reducer._run_comm_hook(bucket).wait()


class _Forward(nn.Module):
    """A model whose forward pass is what it is trained by."""

    def __init__(self, model: nn.Module, logprobs: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._logprobs = logprobs

    def forward(self, *arguments: Any, **tensors: Any) -> Tensor:
        return self._logprobs(*arguments, **tensors)
