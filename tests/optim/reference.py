"""The whole update of Muon and of AdamW once more, in plain NumPy and float64, one matrix at a time: what both halves are compared with.

Notable: nothing is shared with the package but the table of coefficients; no batching, no stacking, no tricks of precision. Weights,
gradients and states are arrays of float64; nothing that is passed in is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from anarcho_optim.coefficients import iteration

Array = np.ndarray
State = dict[str, Array]


def polar(matrix: Array, options: Mapping[str, Any]) -> Array:
    """The Newton-Schulz iterate of one matrix after all steps; zeros stay zeros."""
    steps = iteration(options["variant"], ns_steps=options["ns_steps"], ns_coefficients=options["ns_coefficients"])
    largest = np.abs(matrix).max(initial=0.0)
    if largest == 0:
        return np.zeros_like(matrix)
    x = matrix / largest
    x = x / (steps.safety * np.linalg.norm(x))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for a, b, c in steps.coefficients:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if tall else x


def scale(name: str | None, rows: int, columns: int) -> float:
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if name == "spectral":
        return math.sqrt(rows / columns)
    assert name in ("original", None)
    return math.sqrt(max(1.0, rows / columns))


def cut(shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[tuple[int, ...], list[tuple[slice, slice]]]:
    """The shape (matrices, rows, columns) of a parameter, and the rows and columns of the blocks of each of its matrices."""
    if len(shape) > 2 and not options["flatten"]:
        count, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
    else:
        count, rows, columns = 1, shape[0], math.prod(shape[1:])
    along_rows = options["split_dim"] == 0
    length = rows if along_rows else columns
    sizes = options["split_sizes"] or [length]
    if options["num_heads"]:
        sizes = [length // options["num_heads"]] * options["num_heads"]
    blocks, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        blocks.append((part, slice(0, columns)) if along_rows else (slice(0, rows), part))
        start += size
    assert start == length
    return (count, rows, columns), blocks


def neuron_shape(shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of NorMuon's second moment of a parameter: one value per row and block across, or per block across and column."""
    (_, rows, columns), blocks = cut(shape, options)
    lead = shape[:-2] if len(shape) > 2 and not options["flatten"] else ()
    if options["normuon_axis"] == -1:
        return (*lead, rows, len(blocks) if options["split_dim"] == 1 else 1)
    return (*lead, len(blocks) if options["split_dim"] == 0 else 1, columns)


def muon_state(shape: tuple[int, ...], options: Mapping[str, Any]) -> State:
    """The state before the first step."""
    state = {"momentum": np.zeros(shape)}
    if options["normuon"]:
        state["neuron_mean_sq"] = np.zeros(neuron_shape(shape, options))
    return state


def adamw_state(shape: tuple[int, ...]) -> State:
    """The state before the first step."""
    return {"exp_avg": np.zeros(shape), "exp_avg_sq": np.zeros(shape), "step": np.zeros(())}


def equilibrated(matrix: Array) -> Array:
    """Each row divided by its norm; zero rows stay zero."""
    norms = np.linalg.norm(matrix / max(np.abs(matrix).max(initial=0.0), 1e-300), axis=1, keepdims=True)
    norms = norms * np.abs(matrix).max(initial=0.0)
    return np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)


def normuon(matrix: Array, mean_sq: Array, options: Mapping[str, Any]) -> tuple[Array, Array]:
    """One block divided by the root of its running mean square, at its old norm; and the new mean square."""
    beta2, axis = options["normuon_beta2"], options["normuon_axis"]
    mean_sq = beta2 * mean_sq + (1 - beta2) * np.mean(matrix**2, axis=axis, keepdims=True)
    divided = np.divide(matrix, np.sqrt(mean_sq), out=np.zeros_like(matrix), where=mean_sq > 0)
    norm = np.linalg.norm(divided)
    return (divided * np.linalg.norm(matrix) / norm if norm > 0 else np.zeros_like(matrix)), mean_sq


def _places(shape: tuple[int, ...], options: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where each block lies in (matrices, rows, columns), and where its second moment lies in (matrices, ., .)."""
    (count, _, _), blocks = cut(shape, options)
    for matrix in range(count):
        for index, (rows, columns) in enumerate(blocks):
            one = slice(index, index + 1)
            if options["normuon_axis"] == -1:
                neurons = (matrix, rows, one if options["split_dim"] == 1 else slice(0, 1))
            else:
                neurons = (matrix, one if options["split_dim"] == 0 else slice(0, 1), columns)
            yield (matrix, rows, columns), neurons


def muon_update(weight: Array, gradient: Array, state: State, options: Mapping[str, Any]) -> tuple[Array, State]:
    """The weight and the state after one step of Muon under a group's options."""
    mu = options["momentum"]
    momentum = mu * state["momentum"] + (1 - mu) * gradient
    direction = (1 - mu) * gradient + mu * momentum if options["nesterov"] else momentum
    new = {"momentum": momentum}
    whole, _ = cut(weight.shape, options)
    direction = direction.reshape(whole)
    neurons = None
    if options["normuon"]:
        new["neuron_mean_sq"] = state["neuron_mean_sq"].copy()
        neurons = new["neuron_mean_sq"].reshape(whole[0], *new["neuron_mean_sq"].shape[-2:])
    update = np.zeros(whole)
    for place, neuron_place in _places(weight.shape, options):
        block = direction[place]
        if block.size == 0:
            continue
        o = polar(equilibrated(block) if options["row_equilibration"] else block, options)
        norm = np.linalg.norm(o)
        if options["frobenius_normalization"] and norm > 0:
            o = o * math.sqrt(min(o.shape)) / norm
        if neurons is not None:
            o, neurons[neuron_place] = normuon(o, neurons[neuron_place], options)
        update[place] = scale(options["adjust_lr_fn"], *o.shape) * o
    update = update.reshape(weight.shape)
    decay = options["lr"] * options["weight_decay"] * weight
    if options["cautious_weight_decay"]:
        decay = np.where(update * weight >= 0, decay, 0.0)
    return weight - decay - options["lr"] * update, new


def adamw_update(weight: Array, gradient: Array, state: State, options: Mapping[str, Any]) -> tuple[Array, State]:
    """The weight and the state after one step of AdamW under a group's options."""
    (beta1, beta2), lr = options["betas"], options["lr"]
    step = state["step"] + 1
    mean = beta1 * state["exp_avg"] + (1 - beta1) * gradient
    mean_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2
    denominator = np.sqrt(mean_sq / (1 - beta2**step)) + options["eps"]
    weight = weight - lr * options["weight_decay"] * weight
    weight = weight - lr * (mean / (1 - beta1**step)) / denominator
    return weight, {"exp_avg": mean, "exp_avg_sq": mean_sq, "step": step}
