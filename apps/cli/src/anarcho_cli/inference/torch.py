"""Writing and judging texts with PyTorch; see `anarcho_cli.inference.Inference`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from anarcho_model.generate.batching import Engine
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_model.torch import GPT


def load_model(directory: Path, *, device: str) -> GPT:
    """As `Inference.load_model`."""
    from anarcho_model.weights import load_pretrained

    return load_pretrained(directory, device=device).eval()


def generate(model: GPT, prompt: Sequence[int], *, config: SamplingConfig, kv_bits: int | None = None) -> Iterator[int]:
    """As `Inference.generate`."""
    from anarcho_model.generate.torch import generate as continuation

    _refuse(kv_bits)
    return continuation(model, prompt, config=config)


def make_engine(model: GPT, *, slots: int, context: int | None = None, kv_bits: int | None = None) -> Engine:
    """As `Inference.make_engine`."""
    from anarcho_model.generate.engine.torch import Engine

    _refuse(kv_bits)
    return Engine(model, slots=slots, context=context)


def judge(
    model: GPT,
    tokens: npt.NDArray[np.int64],
    *,
    sources: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """As `Inference.judge`."""
    import torch
    from anarcho_model.logprobs.chunks import chunk_tokens

    device = model.head_weight.device
    size = chunk_tokens(
        len(targets), vocab_size=model.head_weight.shape[0], chunk_bytes=model.chunk_bytes(len(targets))
    )
    logprobs, likeliest = [], []
    with torch.inference_mode():
        hidden = model.hidden_states(torch.from_numpy(tokens).to(device))
        chosen = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(sources).to(device)]
        for part, wanted in zip(chosen.split(size), torch.from_numpy(targets).to(device).split(size), strict=True):
            logits = model.unembed(part.contiguous()).float()
            found = logits.gather(1, wanted[:, None])[:, 0]
            logprobs.append((found - logits.logsumexp(1)).cpu())
            likeliest.append((logits.argmax(1) == wanted).cpu())
    return torch.cat(logprobs).numpy().astype(np.float64), torch.cat(likeliest).numpy()


def _refuse(kv_bits: int | None) -> None:
    if kv_bits is not None:
        raise ValueError(
            f"--kv-bits is {kv_bits}, but PyTorch keeps keys and values as they are here; leave it out, or use --backend mlx"
        )
