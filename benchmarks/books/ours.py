"""This project's own parts as a job wants them: model, groups of parameters, optimizer, training step; and averages of weights.

Notable: models of one configuration are one object, whose weights are drawn anew for each job, so that torch.compile works once for many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_optim.groups import ParamGroups
from anarcho_optim.torch import MuonAdamW, param_groups
from anarcho_train import StepSchedule, TrainConfig
from anarcho_train.micro_batch import Rows
from anarcho_train.steps.torch import TorchStep
from torch import Tensor, nn

from books.jobs import ByName, Job


class OwnModels:
    """Makes training steps of this project; models and their last first weights stay on the device."""

    def __init__(self, device: torch.device, *, precision: Any, compile_mode: Any) -> None:
        self._device, self._precision, self._compile_mode = device, precision, compile_mode
        self._models: dict[tuple[ModelConfig, bool, bool], GPT] = {}
        self._first: tuple[Any, list[Tensor]] | None = None
        self._warm: set[Any] = set()

    def step(self, job: Job) -> TorchStep:
        """A training step with the first weights of the job."""
        key = (job.model, job.narrow_residual, job.float8)
        if key not in self._models:
            self._models[key] = GPT(job.model).to(self._device)
            self._models[key].narrow_residual, self._models[key].float8 = job.narrow_residual, job.float8
        model = self._models[key]
        self._begin(model, job)
        config = TrainConfig(
            grad_clip=job.grad_clip, precision=self._precision, compile=self._compile_mode, seed=job.seed
        )
        return TorchStep(
            model, MuonAdamW(groups(model, job)), config=config, save_model=_no_files, load_model=_no_files
        )

    def warmed(self, job: Job, micro_batches: list[list[Rows]]) -> TorchStep:
        """`step`, when everything that these batches need has been compiled: each shape once, by a step that is undone."""
        o = job.optim
        kernels = (
            o.variant,
            o.nesterov,
            o.normuon,
            o.cautious_weight_decay,
            o.row_equilibration,
            o.frobenius_normalization,
        )
        for batches in micro_batches:
            kind = (job.model, job.narrow_residual, job.float8, kernels, o.ns_dtype, job.per_head)
            key = (*kind, batches[0].tokens.shape)
            if key not in self._warm:
                self.step(job).train(batches, schedule=StepSchedule(lr_scale=0.0))
                self._warm.add(key)
        return self.step(job)

    @torch.no_grad()
    def _begin(self, model: GPT, job: Job) -> None:
        key = (id(model), job.init, job.seed, job.gains, job.scales)
        if self._first is None or self._first[0] != key:
            self._first = None
            model.init_weights(seed=job.seed, init=job.init)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(_find(job.gains, name, job.init.gain(name)))
                else:
                    parameter.mul_(_find(job.scales, name, 1.0))
            self._first = key, [p.detach().clone() for p in model.parameters()]
        torch._foreach_copy_(list(model.parameters()), self._first[1])


def groups(model: nn.Module, job: Job) -> ParamGroups:
    """The groups of `param_groups`, cut where a job gives some parameters a rate or a decay of their own."""
    heads: dict[str, int] = dict.fromkeys(
        ("*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight"), job.model.num_heads
    )
    routed = param_groups(model, config=job.optim, num_heads=heads if job.per_head else None)
    cut: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in routed:
        for name, parameter in group["params"]:
            rate, beta2 = _find(job.rates, name, 1.0), _find(job.beta2s, name, None)
            key = (group["name"], rate, beta2)
            if key not in cut:
                cut[key] = group | {"params": [], "lr": group["lr"] * rate}
                if beta2 is not None and group["algorithm"] == "adamw":
                    cut[key]["betas"] = (group["betas"][0], beta2)
            cut[key]["params"].append((name, parameter))
    return ParamGroups(cut.values())


class WeightAverages:
    """Averages of the weights over the training, each with an influence of age ** power, power 0 being the plain mean.

    Polynomial-decay averaging (Shamir and Zhang 2013, arXiv:1212.1824): one running tensor each, good at every moment, and its reach is a
    share of the training, not a number of steps.
    """

    def __init__(self, parameters: Iterator[Tensor], *, powers: tuple[float, ...]) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._averages = {power: [torch.zeros_like(p) for p in self._parameters] for power in powers}
        self._count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of this moment; moments should be evenly spaced."""
        self._count += 1
        for power, average in self._averages.items():
            torch._foreach_lerp_(average, self._parameters, (power + 1) / (self._count + power))

    @contextmanager
    def applied(self, power: float) -> Iterator[None]:
        """The model has these weights meanwhile."""
        own = [p.clone() for p in self._parameters]
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._averages[power])
        yield
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, own)


def _find(values: ByName, name: str, default: Any) -> Any:
    return next((value for part, value in values if part in name), default)


def _no_files(model: nn.Module, directory: Path) -> None:
    raise ValueError(f"{directory} was to be a checkpoint; expected none of a benchmark")
