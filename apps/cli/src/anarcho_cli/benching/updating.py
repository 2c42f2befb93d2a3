"""One update of a run's optimizer alone, beside the optimizers that its framework brings.

Notable: all of them update parameters of the same shapes from the same random gradients, and take turns, so that a busy machine slows
all alike. A framework's own Muon has its own defaults for the iteration; matrices that hold several, as of queries, keys and values, it
takes for one. Gradients are as wide as their parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from anarcho_cli.back_ends import back_end
from anarcho_cli.benching.cases import Case
from anarcho_cli.benching.subject import device_name, new_step
from anarcho_cli.benching.timing import seconds
from anarcho_cli.config import OptimConfig

Update = Callable[[], object]
"""One update, which has been made when the call ends."""

OWN = "MuonAdamW"
ADAMW, MUON = "AdamW", "Muon + AdamW"
"""What the framework's own optimizers are called in a row."""
GRADIENT_SCALE = 1e-3
SLOW_SECONDS = 5.0
"""From when on rounds are too long to be repeated often."""
PEER_BYTES = 12
"""What each of a framework's optimizers takes for a parameter at most: two moments of float32, and weights of its own in MLX."""


def measure_optimizer(case: Case) -> dict[str, Any]:
    """Seconds of an update of a case's optimizer and of its framework's own ones."""
    framework = back_end(case.backend)
    step: Any = new_step(framework, case.config, device=case.device)
    muon, adamw = _by_algorithm(step.optimizer.param_groups)
    updates = (_mlx_updates if case.backend == "mlx" else _torch_updates)(step, case.config.optim)
    times = time_in_turns(updates, rounds=case.steps)
    own = times.pop(OWN)
    return {
        "device_name": device_name(framework, case.device),
        "optimizer": type(step.optimizer).__name__,
        "muon_tensors": len(muon),
        "adamw_tensors": len(adamw),
        "update_seconds": own,
        "peers": {name: {"update_seconds": value, "ratio": own / value} for name, value in times.items()},
    }


def time_in_turns(updates: Mapping[str, Update], *, rounds: int) -> dict[str, float]:
    """Median seconds of each, after calls that fill caches and compile; of three rounds where more would take too long."""

    def round_times() -> list[float]:
        return [seconds(update) for update in updates.values()]

    if sum(round_times()) < SLOW_SECONDS:
        round_times()
    times, started = [round_times()], time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() - started < SLOW_SECONDS):
        times.append(round_times())
    return {name: median(values) for name, values in zip(updates, zip(*times, strict=True), strict=True)}


def _torch_updates(step: Any, config: OptimConfig) -> dict[str, Update]:
    import torch

    matrices, rest = _by_algorithm(step.optimizer.param_groups)
    for parameter in (*matrices, *rest):
        parameter.grad = torch.randn_like(parameter) * GRADIENT_SCALE
    device = step.device.type
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)

    def adamw(parameters: Sequence[Any]) -> torch.optim.Optimizer:
        rate, betas = config.adamw_lr or config.lr, (config.beta1, config.beta2)
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, eps=config.eps, weight_decay=0.0, fused=True)

    def update(*optimizers: torch.optim.Optimizer) -> Update:
        def run() -> None:
            for optimizer in optimizers:
                optimizer.step()
            wait()

        return run

    found = {OWN: update(step.optimizer), ADAMW: update(adamw([*matrices, *rest]))}
    if matrices and all(parameter.ndim == 2 for parameter in matrices):  # PyTorch's takes no others.
        muon = torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, nesterov=config.nesterov
        )
        found[MUON] = update(muon, *([adamw(rest)] if rest else []))
    return found


def _mlx_updates(step: Any, config: OptimConfig) -> dict[str, Update]:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten

    parameters: dict[str, Any] = dict(tree_flatten(step.model.trainable_parameters()))
    gradients = {name: GRADIENT_SCALE * mx.random.normal(p.shape, dtype=p.dtype) for name, p in parameters.items()}
    mx.eval(parameters, gradients)
    matrices, rest = _by_algorithm(step.optimizer.param_groups)

    def adamw() -> optim.Optimizer:
        rate, betas = config.adamw_lr or config.lr, [config.beta1, config.beta2]
        return optim.AdamW(rate, betas=betas, eps=config.eps, weight_decay=0.0, bias_correction=True)

    def update(*shares: tuple[optim.Optimizer, Sequence[str]]) -> Update:
        for optimizer, names in shares:
            optimizer.init({name: parameters[name] for name in names})
        state, weights = [optimizer.state for optimizer, _ in shares], dict(parameters)

        def apply(gradients: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
            updated = {}
            for optimizer, names in shares:
                updated |= optimizer.apply_gradients({name: gradients[name] for name in names}, weights)
            return updated

        function = mx.compile(apply, inputs=state, outputs=state) if step.compiled else apply

        def run() -> None:
            weights.update(function(gradients, weights))
            mx.eval(weights, [optimizer.state for optimizer, _ in shares])

        return run

    found = {OWN: update((step.optimizer, list(parameters))), ADAMW: update((adamw(), list(parameters)))}
    if matrices:
        muon = optim.Muon(config.lr, config.momentum, config.weight_decay, config.nesterov)
        found[MUON] = update((muon, matrices), (adamw(), rest))
    return found


def _by_algorithm(groups: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What Muon updates, and what AdamW does: tensors, or in MLX their names."""
    muon, adamw = (
        [member for group in groups if group["algorithm"] == algorithm for member in group["params"]]
        for algorithm in ("muon", "adamw")
    )
    return muon, adamw
