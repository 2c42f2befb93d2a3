"""The options that `chat`, `eval`, `generate` and `serve` share: which model, where it runs, and how its tokens are drawn.

Aliases for Typer; a command gives its own defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anarcho_cli.devices import Backend, Device
from anarcho_cli.models import Which


def check_kv_bits(bits: int | None) -> int | None:
    """Raise ValueError for a number of bits that no cache keeps."""
    if bits not in (None, 4, 8):
        raise ValueError(f"--kv-bits is {bits}, expected 4 or 8; leave it out to keep keys and values as they are")
    return bits


Model = Annotated[Path, typer.Argument(metavar="RUN", help="A run, a checkpoint or a model directory.")]
Checkpoint = Annotated[Which, typer.Option("--checkpoint", help="Which checkpoint of a run.")]
RunsOn = Annotated[Device, typer.Option("--device", help="Where the model runs.")]
RunsWith = Annotated[
    Backend | None,
    typer.Option("--backend", help="Framework that computes, torch if left out; mlx is made for Apple GPUs."),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        callback=check_kv_bits,
        help="With mlx: keep keys and values in 4 or 8 bits, for long contexts.",
    ),
]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw among the likeliest that hold this share.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Least probability, relative to the likeliest.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the draws, to repeat a text.")]


def chosen_place(backend: Backend | None, device: Device) -> dict[str, str]:
    """The framework and the device to load a model with, as keywords; raises DeviceError where one is not there."""
    from anarcho_cli.devices import resolve_backend, resolve_device

    framework = resolve_backend(backend)
    return {"backend": framework.value, "device": resolve_device(device, backend=framework).device}
