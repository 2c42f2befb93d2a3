"""What a job can train in place of this project's parts: transformers' Llama of the same shape in a plain, compiled loop.

The matrix products are in bfloat16 under autocast where the device has them, the weights float32, the gradient is clipped, AdamW is
PyTorch's fused one with weight decay on everything. With Muon, `torch.optim.Muon` has the matrices of the blocks, with
``match_rms_adamw``, so that one learning rate serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from anarcho_train import LossSum, StepSchedule
from anarcho_train.micro_batch import Rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from books.jobs import Job


@dataclass(frozen=True, kw_only=True)
class PeerMetrics:
    """What a step reports; the loss is read when it is needed."""

    loss: Tensor


class PeerStep:
    """The verbs of this project's step that a training needs."""

    def __init__(self, job: Job, *, device: torch.device, compiled: bool) -> None:
        shape = job.model
        torch.manual_seed(job.seed)
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.ffn_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context_length,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=shape.tie_embeddings,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        self.model: nn.Module = LlamaForCausalLM(config)
        nn.Module.to(self.model, device)
        self._called = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._device, self._clip = device, job.grad_clip
        self._optimizers = _optimizers(self.model, job)
        self._rates = [[group["lr"] for group in o.param_groups] for o in self._optimizers]

    def warm(self, batch: Rows) -> None:
        """Compiles what a batch of this shape needs."""
        self._loss(batch).backward()
        self.model.zero_grad(set_to_none=True)

    def train(self, micro_batches: list[Rows], *, schedule: StepSchedule) -> PeerMetrics:
        """One update."""
        total = torch.zeros((), device=self._device)
        for batch in micro_batches:
            loss = self._loss(batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.lr_scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return PeerMetrics(loss=total)

    in_parts = False

    def evaluate(self, batch: Rows) -> LossSum:
        """The summed loss of a batch, in the compiled graph of the training."""
        weights = torch.from_numpy(batch.weights).to(self._device)
        losses = self._losses(batch).detach() * weights.reshape(-1)
        return LossSum(loss=float(losses.sum(dtype=torch.float64)), weight=float(batch.weights.sum()))

    def _loss(self, batch: Rows) -> Tensor:
        return self._losses(batch).mean()

    def _losses(self, batch: Rows) -> Tensor:
        tokens, targets = (torch.from_numpy(a).to(self._device).long() for a in (batch.tokens, batch.targets))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits = self._called(input_ids=tokens).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


def _optimizers(model: nn.Module, job: Job) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = {n: p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
    settings: dict[str, Any] = {"lr": job.optim.lr, "weight_decay": job.optim.weight_decay}
    if job.peer == "adamw":
        return [torch.optim.AdamW(named.values(), betas=(0.9, 0.95), fused=True, **settings)]
    rest = [p for n, p in named.items() if n not in matrices]
    return [
        torch.optim.Muon(list(matrices.values()), adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True, **settings),
    ]
