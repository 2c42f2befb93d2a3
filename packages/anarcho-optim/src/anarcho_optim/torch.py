"""Muon for matrices and AdamW for the rest, as one `torch.optim.Optimizer`.

Notable: the mathematics is the pure function `orthogonalize`; matrices of one shape run as one batched iteration, capped in memory;
parameters are routed by module type and identity, never by name; state is created eagerly, per parameter, in float32, under the names
``momentum``, ``exp_avg``, ``exp_avg_sq`` and ``step``; gradients are never modified; the decay is decoupled and uses the unscaled rate.

Sources: Muon, Keller Jordan (https://kellerjordan.github.io/posts/muon/); scale ``match_rms_adamw``, Liu et al., "Muon is scalable for LLM
training", arXiv:2502.16982; ``spectral``, Bernstein, "Deriving Muon"; AdamW, Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from anarcho_optim.coefficients import Variant, variant
from anarcho_optim.config import OptimConfig
from anarcho_optim.memory import BATCH_BYTES

EMBEDDING_MODULES = (nn.Embedding, nn.EmbeddingBag)


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def resolve_ns_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the iteration on ``device``: ``auto`` is bfloat16 where it is native, float32 elsewhere (MPS included)."""
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def orthogonalize(updates: Tensor, *, variant: Variant, dtype: torch.dtype = torch.float32) -> Tensor:
    """The approximate polar factors U V' of a stack of matrices, by Newton-Schulz iteration.

    ``updates`` is float32 (matrices, rows, columns); the result has its shape and is float32. Each matrix is normalised by itself, so its
    scale does not matter, however small or large; a matrix of zeros gives zeros. ``dtype`` is the arithmetic of the products.
    Source: see `anarcho_optim.coefficients`.
    """
    transposed = updates.shape[-2] > updates.shape[-1]
    x = updates.mT if transposed else updates
    largest = torch.linalg.vector_norm(x, ord=math.inf, dim=(-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x.div_(torch.where(norm > 0, norm * variant.safety, 1.0)).to(dtype)
    for a, b, c in variant.coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if transposed else x).float()


def shape_scale(name: str, rows: int, columns: int) -> float:
    """The factor S by which an orthogonal update of a (rows, columns) matrix is scaled before the learning rate is applied."""
    match name:
        case "original":
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case "spectral":
            return math.sqrt(rows / columns)
    raise ValueError(f"adjust_lr_fn is {name!r}; expected original, match_rms_adamw or spectral")


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for `MuonAdamW`; ``str()`` gives a table of what is routed where."""

    def __str__(self) -> str:
        lines = [f"{'algorithm':<10}{'tensors':>8}{'parameters':>14}{'lr':>10}{'decay':>8}  name"]
        for group in self:
            count = sum(p.numel() for p in group["params"])
            lines.append(
                f"{group['algorithm']:<10}{len(group['params']):>8}{count:>14,}{group['lr']:>10.2g}"
                f"{group['weight_decay']:>8.2g}  {group['name']}"
            )
        return "\n".join(lines)


def _embedding_tables(model: nn.Module) -> list[Tensor]:
    """Tables of embeddings, which whatever is tied to them shares."""
    return [p for m in model.modules() if isinstance(m, EMBEDDING_MODULES) for p in m.parameters(recurse=False)]


def _output_heads(model: nn.Module, tables: list[Tensor]) -> Iterator[Tensor]:
    """Weights of linear layers from an embedding's width to its vocabulary; tied ones are among ``tables`` themselves."""
    vocabularies = {tuple(p.shape) for p in tables}
    for module in model.modules():
        if isinstance(module, nn.Linear) and (module.out_features, module.in_features) in vocabularies:
            yield module.weight


def param_groups(model: nn.Module, *, config: OptimConfig | None = None) -> ParamGroups:
    """Routes every trainable parameter of ``model`` to one half of the optimizer, by module type and identity.

    Embeddings, everything tied to them, output heads and every parameter with fewer than two dimensions go to AdamW; the matrices go to
    Muon. Raises ValueError that names the parameter for one that fits neither half (more than two dimensions, not floating point).
    """
    config = config or OptimConfig()
    tables = _embedding_tables(model)
    table_ids, head_ids = {id(p) for p in tables}, {id(p) for p in _output_heads(model, tables)}
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    heads: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name} has dtype {parameter.dtype}; expected a floating-point parameter, or freeze it"
            )
        if id(parameter) in table_ids:
            embeddings.append(parameter)
        elif id(parameter) in head_ids:
            heads.append(parameter)
        elif parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2:
            matrices.append(parameter)
        else:
            raise ValueError(
                f"parameter {name} has shape {tuple(parameter.shape)}; expected at most two dimensions: "
                "put it into a group of its own with algorithm 'adamw'"
            )
    muon = {
        "algorithm": "muon",
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "variant": config.variant,
        "adjust_lr_fn": config.adjust_lr_fn,
        "ns_dtype": config.ns_dtype,
    }
    adamw_lr = config.lr if config.adamw_lr is None else config.adamw_lr
    embedding_lr = adamw_lr if config.embedding_lr is None else config.embedding_lr
    adam = {
        "algorithm": "adamw",
        "lr": adamw_lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    groups = [
        {"name": "matrices", "params": matrices, **muon},
        {
            "name": "embeddings",
            "params": embeddings,
            "weight_decay": config.adamw_weight_decay,
            **adam,
            "lr": embedding_lr,
        },
        {"name": "heads", "params": heads, "weight_decay": config.adamw_weight_decay, **adam},
        {"name": "gains and biases", "params": vectors, "weight_decay": 0.0, **adam},
    ]
    return ParamGroups(group for group in groups if group["params"])


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer with two update rules: each group's ``algorithm`` is ``"muon"`` or ``"adamw"``.

    ``params`` are groups as `param_groups` builds them; keys that a group leaves out take `OptimConfig`'s defaults. Muon groups hold
    matrices only. Learning-rate schedulers, gradient scalers and `state_dict` work as with any torch optimizer.

    Raises ValueError for a group without a known ``algorithm``, a parameter given twice, a Muon parameter that is no matrix, a
    parameter that is not floating point, and a learning rate that is negative or not a number.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        config = OptimConfig()
        defaults = {
            "lr": config.lr,
            "weight_decay": 0.0,
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "variant": config.variant,
            "adjust_lr_fn": config.adjust_lr_fn,
            "ns_dtype": config.ns_dtype,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
        }
        super().__init__(list(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checks it and creates its state; raises ValueError as the class does."""
        group_name = param_group.get("name", f"group {len(self.param_groups)}")
        if param_group.get("algorithm") not in ("muon", "adamw"):
            raise ValueError(
                f"{group_name} has algorithm {param_group.get('algorithm')!r}; expected 'muon' or 'adamw': "
                "build the groups with param_groups(model)"
            )
        lr = param_group.get("lr", self.defaults["lr"])
        if not float(lr) >= 0:
            raise ValueError(f"{group_name} has the learning rate {lr}; expected zero or a positive number")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["algorithm"] == "muon":
            variant(group["variant"])
            shape_scale(group["adjust_lr_fn"], 1, 1)
        for index, parameter in enumerate(group["params"]):
            where = f"parameter {index} of {group_name}, of shape {tuple(parameter.shape)},"
            if not parameter.is_floating_point():
                raise ValueError(f"{where} has dtype {parameter.dtype}; expected a floating-point parameter")
            if group["algorithm"] == "muon" and parameter.ndim != 2:
                raise ValueError(
                    f"{where} is no matrix; expected two dimensions: give it to a group with algorithm 'adamw'"
                )
            self._create_state(parameter, algorithm=group["algorithm"])

    def _create_state(self, parameter: Tensor, *, algorithm: str) -> None:
        state = self.state[parameter]
        zeros = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
        if algorithm == "muon":
            state["momentum"] = zeros
        else:
            state["exp_avg"] = zeros
            state["exp_avg_sq"] = torch.zeros_like(zeros)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state; unlike torch's default it stays float32 when the parameters are not."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            saved = state_dict["state"][index]
            self.state[parameter] = {
                key: value.to(device=parameter.device, dtype=torch.float32, copy=True) for key, value in saved.items()
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the gradients; parameters whose gradient is None are left alone. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if not with_gradient:
                continue
            if group["algorithm"] == "muon":
                self._muon_step(group, with_gradient)
            else:
                self._adamw_step(group, with_gradient)
        return loss

    def _muon_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for batch in _same_shape_batches(parameters):
            rows, columns = batch[0].shape
            gradients = [g.float() for g in _gradients(batch)]
            momenta = [self.state[p]["momentum"] for p in batch]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch.stack(gradients if group["nesterov"] else momenta)
            if group["nesterov"]:
                torch._foreach_lerp_(list(updates.unbind()), momenta, group["momentum"])
            dtype = resolve_ns_dtype(group["ns_dtype"], batch[0].device)
            updates = orthogonalize(updates, variant=variant(group["variant"]), dtype=dtype)
            scale = shape_scale(group["adjust_lr_fn"], rows, columns)
            torch._foreach_mul_(batch, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                batch, [u.to(p.dtype) for u, p in zip(updates, batch, strict=True)], alpha=-group["lr"] * scale
            )

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        # Arithmetic is float32 whatever the parameters are; `float()` is no copy where they already are float32.
        weights = [p.float() for p in parameters]
        adamw(
            weights,
            [g.float() for g in _gradients(parameters)],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if parameter.dtype != torch.float32:
                parameter.copy_(weight)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _same_shape_batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Splits matrices into lists of one shape, dtype and device, none larger than `BATCH_BYTES` in float32 (unless one matrix is)."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        buckets.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for bucket in buckets.values():
        size = max(1, BATCH_BYTES // (4 * bucket[0].numel()))
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size]
