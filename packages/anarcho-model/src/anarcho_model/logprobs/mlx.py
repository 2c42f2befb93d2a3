"""Log-probabilities of target tokens for MLX, computed a chunk of tokens at a time in forward and in backward.

Every loss is a function of these numbers, and the logits behind them are the largest tensor of a small model (16
sequences of 4096 tokens and 32000 ids: 8 GB in float32). Notable:

* forward keeps one float32 normaliser a token and drops the logits, backward computes them again, so that never more
  than one chunk exists; but those of the last chunk are still there when backward begins, and it begins with them;
* each chunk depends on the one before (`mx.depends`): MLX evaluates a graph in breadth, and would else have the logits
  of all chunks at once; backward's depend on the incoming gradient, or `mx.compile` would take forward's for them;
* matrix products run in the compute dtype, normalisers, probabilities and the sum of the weights' gradient are float32.

Source: the recomputed, chunked cross-entropy of Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and Liger
    Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from jaxtyping import Float, Int

from anarcho_model.logprobs.chunks import chunk_tokens

__all__ = ["chunked_logprobs"]


def chunked_logprobs(
    hidden: Float[mx.array, "tokens dim"],
    weight: Float[mx.array, "vocab dim"],
    targets: Int[mx.array, " tokens"],
    *,
    compute_dtype: mx.Dtype,
    chunk_bytes: int,
    frozen: bool = False,
) -> Float[mx.array, " tokens"]:
    """`log_softmax(hidden @ weight.T)` at `targets`, in float32, differentiable once.

    `chunk_bytes` bounds the float32 logits of one chunk; `compute_dtype` is the element type of the matrix products. The gradient of
    `frozen` weights is zero, and not computed.
    """
    size = chunk_tokens(hidden.shape[0], vocab_size=weight.shape[0], chunk_bytes=chunk_bytes)
    starts = range(0, hidden.shape[0], size)

    @mx.custom_function
    def logprobs(hidden: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return _forward(hidden.astype(compute_dtype), weight.astype(compute_dtype), targets, starts)

    @logprobs.vjp
    def _(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, mx.array, mx.array]:
        hidden, weight, targets = primals
        grad_hidden, grad_weight = _backward(
            hidden.astype(compute_dtype),
            weight.astype(compute_dtype),
            targets,
            outputs[1],
            outputs[2],
            cotangents[0],
            starts,
            frozen=frozen,
        )
        return grad_hidden.astype(hidden.dtype), grad_weight.astype(weight.dtype), mx.zeros_like(targets)

    return logprobs(hidden, weight, targets)[0]  # pyright: ignore[reportIndexIssue]


def _forward(
    hidden: mx.array, weight: mx.array, targets: mx.array, starts: range
) -> tuple[mx.array, mx.array, mx.array]:
    """The log-probability of each target, the normaliser of each token, and the logits of the last chunk."""
    logits = mx.zeros((0, weight.shape[0]), hidden.dtype)
    logprobs: list[mx.array] = []
    normalisers: list[mx.array] = []
    for start in starts:
        rows = slice(start, start + starts.step)
        part = mx.depends(hidden[rows], normalisers[-1]) if normalisers else hidden[rows]
        logits = part @ weight.T
        # A GPU has a kernel that sums in float32 whatever it reads.
        summed = logits.astype(mx.float32) if mx.default_device() == mx.cpu else logits
        losses = mx.fast.cross_entropy(summed, targets[rows])
        target_logits = mx.take_along_axis(logits, targets[rows, None], axis=1)[:, 0]
        normalisers.append(losses + target_logits.astype(mx.float32))
        logprobs.append(-losses)
    return mx.concatenate(logprobs), mx.concatenate(normalisers), logits


def _backward(
    hidden: mx.array,
    weight: mx.array,
    targets: mx.array,
    normalisers: mx.array,
    last_logits: mx.array,
    grad_output: mx.array,
    starts: range,
    *,
    frozen: bool,
) -> tuple[mx.array, mx.array]:
    """Gradients of the hidden states, in the compute dtype, and of the weights, in float32; zeros for `frozen` ones."""
    ids = mx.arange(weight.shape[0], dtype=targets.dtype)
    grad_weight = mx.zeros(weight.shape, dtype=mx.float32)
    grad_hidden: list[mx.array] = []
    before = [grad_output]
    for start in reversed(starts):
        rows = slice(start, start + starts.step)
        part = mx.depends(hidden[rows], before)
        logits = part @ weight.T if grad_hidden else mx.depends(last_logits, before)
        # MLX's compiler writes the gradient where the logits were, which a kernel of our own could not.
        probabilities = mx.exp(logits.astype(mx.float32) - normalisers[rows, None])
        hits = (ids == targets[rows, None]).astype(mx.float32)
        grad_logits = ((hits - probabilities) * grad_output[rows, None]).astype(weight.dtype)
        grad_hidden.append(grad_logits @ weight)
        before = [grad_hidden[-1]]
        if not frozen:
            added = (grad_logits.T @ part).astype(mx.float32)
            grad_weight = grad_weight + added if len(grad_hidden) > 1 else added
            before.append(grad_weight)
    return mx.concatenate(grad_hidden[::-1]), grad_weight
