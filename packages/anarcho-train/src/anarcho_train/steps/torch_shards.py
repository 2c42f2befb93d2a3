"""The model in shards: each process holds a part of every weight, of its gradient and of its optimizer's state (FSDP2).

Notable:

* All processes may hold one model together, or those of each machine one (HSDP): then whole weights never travel between machines, but
  what is left of a step's gradients when they are shared out, once.
* A block's weights are whole only while it computes, so every forward pass needs all processes: who has fewer micro-batches than others
  computes some without counting them, and who has none helps (`TorchRanks.together`).
* Under bfloat16, the matrices of blocks travel in it, which halves what is gathered; they are what autocast would make of them. Gradients
  are summed in float32, and norms, residual stream and embedding are float32 as in one process.
* A rank whose memory runs out hands over zeros for what is left of a step, which all of them then drop (`steps.torch_exchanges`).
* Between the micro-batches of a step, whole gradients stay where they are while they are small beside the device's memory: then they travel
  once. Larger ones are shared out each time.
* The model's files are written whole: one tensor at a time is gathered on the device, and rank 0 alone keeps it, in the host's memory.
  The other processes take part when they next have anything to say. Of the optimizer's state each process writes what it has.

Sources: ZeRO (arXiv:1910.02054), PyTorch FSDP (arXiv:2304.11277).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from anarcho_train.optimizer_layout import part_name, rows_note
from anarcho_train.out_of_memory import is_out_of_memory, reason
from anarcho_train.steps.agreement import agreed_memory
from anarcho_train.steps.torch_exchanges import Exchanges
from anarcho_train.steps.torch_files import StateFile
from anarcho_train.steps.torch_ranks import TorchRanks
from anarcho_train.steps.torch_state import own_part

FORWARD, WEIGHTS = 1, 2
"""What a process may need the others for besides a step; see `TorchRanks.together`."""

HELD_GRADIENTS_SHARE = 0.1
"""Of the device's memory, that whole gradients may take between micro-batches."""


class Shards:
    """A model whose parameters are shared out, in place, over the ranks; made before its optimizer is.

    ``blocks`` are the modules that become whole one after the other. ``device`` is where the shards go; the model may lie elsewhere.
    There are ``replicas`` of the model, each in shards over as many ranks that follow each other: usually those of a machine. Under
    autocast, ``compute`` is its type.
    """

    shared = True
    """Whether a forward pass needs all processes."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ranks: TorchRanks,
        *,
        device: torch.device,
        replicas: int = 1,
        compute: torch.dtype = torch.float32,
    ) -> None:
        ranks.join_devices(device)
        self._model, self._blocks, self._ranks, self._compute = model, list(blocks), ranks, compute
        self._empty = _on_meta(model)
        gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self._holds_gradients = gradient_bytes <= HELD_GRADIENTS_SHARE * _memory_bytes(device)
        mesh = _mesh(ranks, device, replicas=replicas)
        self._sharing = mesh.get_group(mesh.ndim - 1)
        across = mesh.get_group(0) if replicas > 1 else None
        with ranks.watched():
            for block in self._blocks:
                fully_shard(block, mesh=mesh, mp_policy=_block_policy(compute))
            fully_shard(model, mesh=mesh)
        self._exchanges = Exchanges(model, [*self._blocks, model], across=across)
        self._in_last_backward = False
        own: Any = model.token_logprobs
        # What leaves the model must be no view: hooks are on the tensor itself.
        model.token_logprobs = lambda *tensors, **named: own(*tensors, **named).clone()  # type: ignore[assignment]
        register_fsdp_forward_method(model, "token_logprobs")
        ranks.is_torn = lambda: True  # What the others held is gone.

    def serve(self) -> None:
        """From now on this process helps others."""
        self._ranks.help_with(
            {
                FORWARD: self._forward_for_others,
                WEIGHTS: lambda: _take_part(self._weights()),
            }
        )

    def compiled(self, logprobs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, with its blocks compiled: what gathers their weights stands between them."""
        for block in self._blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        return logprobs

    def leave_compilation(self) -> None:
        """Blocks are as they were."""
        for block in self._blocks:
            block.__dict__.pop("forward", None)

    def padded(self, micro_batches: Sequence[Any], most: int) -> list[tuple[Any, float]]:
        """As many micro-batches as any rank has, each with what its loss counts; the last one is a real one."""
        self._learn_exchanges()
        self._exchanges.begin_step(micro_batches=most)
        self._in_last_backward = False
        missing = most - len(micro_batches)
        return [(micro_batches[0], 0.0)] * missing + [(batch, 1.0) for batch in micro_batches]

    def __call__(self, *arguments: Any, **tensors: Any) -> Tensor:
        """Log-probabilities whose gradient is to be trained with."""
        return self._model.token_logprobs(*arguments, **tensors)  # type: ignore[operator]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Memory that runs out in the block is known to all ranks at its end, to which one without memory does its part with zeros."""
        with agreed_memory(self._ranks), self._keeping_up():
            yield

    @contextmanager
    def local(self) -> Iterator[None]:
        """Forward and backward passes whose gradients may stay here, or within a replica, for now."""
        self._root.set_requires_gradient_sync(not self._holds_gradients)
        self._root.set_requires_all_reduce(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """The last backward pass, after which each rank has its part of the mean of all gradients."""
        self._in_last_backward = True
        yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A forward pass in which the others take part."""
        with self._ranks.together(FORWARD):
            self._exchanges.begin_forward()
            self._in_last_backward = False
            try:
                with self._keeping_up():
                    yield
            except Exception as error:
                if is_out_of_memory(error):
                    self._exchanges.forget()
                raise
            finally:
                self._put_away()

    def renew(self) -> None:
        """Begins anew after a step that was broken off by all."""
        self._exchanges.forget()
        self._put_away()

    def whole_model(self) -> nn.Module:
        """A copy of the model with whole weights in the host's memory; of rank 0 alone."""
        with self._ranks.together(WEIGHTS):
            self._put_away()
            return self._filled(_gather(self._weights()))

    @property
    def writes_all(self) -> bool:
        """Whether this process writes what is of no process alone."""
        return self._ranks.rank == 0

    def state_file(self, tensors: Mapping[str, Tensor], *, copy: bool) -> StateFile:
        """What this process has of the optimizer's tensors, in the host's memory."""
        found, notes = own_part(tensors, first_process=self.writes_all, copy=copy)
        return StateFile(name=part_name(self._ranks.rank, self._ranks.size), tensors=found, notes=rows_note(notes))

    @torch.no_grad()
    def change(self, change: Callable[[nn.Module], None]) -> None:
        """Lets a function set the weights that are trained, of a whole copy in the host's memory; each rank keeps its part."""
        self._put_away()
        sizes = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in self._weights().items()}
        whole = self._filled(sizes)
        change(whole)
        for name, found in whole.named_parameters():
            parameter = self._weights()[name]
            if parameter.requires_grad:
                parameter.copy_(self.part(found.detach(), parameter))

    def part(self, whole: Tensor, like: Tensor) -> Tensor:
        """What lies as ``like`` does of a tensor that all ranks have."""
        if not isinstance(like, DTensor):
            return whole
        return distribute_tensor(
            whole.to(like.to_local().device), like.device_mesh, like.placements, src_data_rank=None
        )

    def sum(self, numbers: Tensor) -> Tensor:
        """Sums over what the ranks of one replica hold of the same tensors."""
        return self._ranks.sum(numbers, group=self._sharing)

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self._model, FSDPModule)
        return self._model

    def _weights(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters())

    def _put_away(self) -> None:
        """Nothing is whole any more that a forward pass without a backward pass has left so."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _filled(self, weights: Mapping[str, Tensor]) -> nn.Module:
        return _with_parameters(self._empty, lambda name, p: nn.Parameter(weights[name], requires_grad=p.requires_grad))

    @torch.no_grad()
    def _forward_for_others(self) -> None:
        self._forward_of_one_token()
        self._put_away()

    def _forward_of_one_token(self) -> Tensor:
        device = next(self._model.parameters()).device
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        narrow = torch.autocast(device.type, dtype=self._compute, enabled=self._compute != torch.float32)
        with torch.compiler.set_stance("force_eager"), narrow:
            return self(token, token)

    def _learn_exchanges(self) -> None:
        """Before the first step: all ranks pass one token without a loss."""
        if self._exchanges.learned:
            return
        self._exchanges.learn(lambda: 0.0 * self._forward_of_one_token().sum(), local=self.local)
        for parameter in self._model.parameters():
            parameter.grad = None

    @contextmanager
    def _keeping_up(self) -> Iterator[None]:
        """A rank that finds no memory in the block does its part of what the others exchange in it, or leaves where it cannot."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = reason(error)
            if not self._does_the_rest():
                raise self._ranks.abandon(_left(what)) from None
            raise

    def _does_the_rest(self) -> bool:
        try:
            return self._exchanges.finish(last=self._in_last_backward)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False


def _block_policy(compute: torch.dtype) -> MixedPrecisionPolicy:
    """What of a block travels as what: its matrices in the type that autocast makes of them anyway, gradients in float32.

    Vectors stay as they are, because norms multiply by them in float32; PyTorch before 2.15 makes no such difference. Nothing is cast
    where a block begins or ends, so the residual stream is what it is in one process.
    """
    if compute == torch.float32:
        return MixedPrecisionPolicy()
    options: dict[str, Any] = {"param_dtype": compute, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    if "param_dtype_override_fn" in {field.name for field in fields(MixedPrecisionPolicy)}:
        options["param_dtype_override_fn"] = lambda parameter: parameter.dtype if parameter.ndim < 2 else None
    return MixedPrecisionPolicy(**options)


def _mesh(ranks: TorchRanks, device: torch.device, *, replicas: int) -> DeviceMesh:
    """The ranks as `fully_shard` wants them: in a row, or with a row for each replica."""
    assert ranks.computing is not None, "a model is shared out over several processes"
    if replicas == 1:
        return DeviceMesh.from_group(ranks.computing, device.type)
    numbers = torch.tensor(ranks.numbers(range(ranks.size))).view(replicas, -1)
    groups = ranks.grid(replicas, device)
    return DeviceMesh.from_group(list(groups), device.type, mesh=numbers, mesh_dim_names=("replicas", "shards"))


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory of whole tensors, of which one at a time is on the device."""
    return {name: _whole(tensor).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _take_part(tensors: Mapping[str, Tensor]) -> None:
    """This process's part in what another one gathers."""
    for tensor in tensors.values():
        _whole(tensor)


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _on_meta(model: nn.Module) -> nn.Module:
    """The structure of a model, without memory for its parameters; buffers are copies in the host's."""
    return _with_parameters(
        model, lambda _, p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    )


def _with_parameters(model: nn.Module, make: Callable[[str, Tensor], nn.Parameter]) -> nn.Module:
    """A copy of a module with other parameters."""
    copies: dict[int, Any] = {id(p): make(name, p) for name, p in model.named_parameters()}
    copies |= {id(buffer): buffer.detach().to("cpu", copy=True) for buffer in model.buffers()}
    return copy.deepcopy(model, copies)


def _memory_bytes(device: torch.device) -> float:
    """Of the device; a CPU's processes are taken to have room for gradients."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else float("inf")


def _left(what: str) -> str:
    return f"memory ran out here ({what}) where the other processes could not be told"
