"""Writing and judging texts with MLX; see `anarcho_cli.inference.Inference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from anarcho_model.generate.batching import Engine
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_model.mlx import GPT


def load_model(directory: Path, *, device: str) -> GPT:
    """As `Inference.load_model`; MLX computes on this device from now on, within bounds of its memory."""
    from anarcho_model.weights_mlx import load_pretrained

    from anarcho_cli.back_ends.mlx import limit_memory

    limit_memory(device)
    return load_pretrained(directory)


def generate(model: GPT, prompt: Sequence[int], *, config: SamplingConfig, kv_bits: int | None = None) -> Iterator[int]:
    """As `Inference.generate`."""
    from anarcho_model.generate.mlx import generate as continuation

    return continuation(model, prompt, config=config, kv_bits=kv_bits)


def make_engine(model: GPT, *, slots: int, context: int | None = None, kv_bits: int | None = None) -> Engine:
    """As `Inference.make_engine`."""
    from anarcho_model.generate.engine.mlx import Engine
    from anarcho_model.generate.stepping.mlx import Stepper

    return Engine(model, slots=slots, context=context, stepping=partial(Stepper, kv_bits=kv_bits))


def judge(
    model: GPT,
    tokens: npt.NDArray[np.int64],
    *,
    sources: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """As `Inference.judge`."""
    import mlx.core as mx
    from anarcho_model.logprobs.chunks import chunk_tokens

    size = chunk_tokens(len(targets), vocab_size=model.head_weight.shape[0], chunk_bytes=model.logits_chunk_bytes)
    hidden = model.hidden_states(mx.array(tokens.astype(np.int32)))
    chosen = hidden.reshape(-1, hidden.shape[-1])[mx.array(sources.astype(np.int32))]
    logprobs, likeliest = [], []
    for start in range(0, len(targets), size):
        wanted = mx.array(targets[start : start + size].astype(np.int32))
        logits = model.unembed(chosen[start : start + size]).astype(mx.float32)
        found = mx.take_along_axis(logits, wanted[:, None], axis=1)[:, 0]
        logprob, best = found - mx.logsumexp(logits, axis=1), mx.argmax(logits, axis=1) == wanted
        mx.eval(logprob, best)  # or the logits of all chunks would exist at once
        logprobs.append(np.array(logprob))
        likeliest.append(np.array(best))
    return np.concatenate(logprobs).astype(np.float64), np.concatenate(likeliest)
