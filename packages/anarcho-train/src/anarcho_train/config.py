"""What a training run does and when: the settings of the loop, free of any framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batch, evaluation, checkpoints and arithmetic of one run."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_tokens: int = 65536
    """Tokens per optimizer step, over all micro-batches; a multiple of the sequence length."""
    sequence_length: int | None = None
    """Tokens per training sequence; left out, the model's context length."""
    micro_batch: int = 1
    """Sequences that go through the model at once; changes memory and speed, never the gradient's meaning."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    eval_every: int = 250
    """Optimizer steps between evaluations on the validation text; 0 evaluates only at the end."""
    eval_tokens: int | None = None
    """Validation tokens of an evaluation during training; left out, all. The last evaluation always reads all."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; 0 writes only the last and the best one."""
    keep_last: int = 2
    """How many of the newest checkpoints stay; the best one stays in any case."""
    early_stopping_patience: int = 0
    """Evaluations without a better validation loss after which the run stops; 0 never stops early."""
    early_stopping_min_delta: float = 0.0
    """Improvement of the validation loss, in nats per token, that counts as better."""
    log_every: int = 10
    """Optimizer steps between lines of the metrics file."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the matrix products; weights, gradients and optimizer state are float32 in any case."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the model runs through torch.compile; `auto` compiles where it pays for itself over the run.

    On a CPU with several threads a compiled run is not repeatable to the last bit; an uncompiled one is."""
    gradient_checkpointing: bool = False
    """Whether each block's activations are computed again in the backward pass instead of being kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "micro_batch", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected a whole number of at least 1")
        for name in ("sequence_length", "eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"train.{name} is {value}; expected a whole number of at least 1, or leave the key out"
                )
        for name in ("eval_every", "checkpoint_every", "early_stopping_patience", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected zero or a positive whole number")
        for name in ("grad_clip", "early_stopping_min_delta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected zero or a positive number")
        choices = {"precision": ("auto", "float32", "bfloat16", "float16"), "compile": ("auto", "on", "off")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"train.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")

    def batch_sequences(self, sequence_length: int) -> int:
        """Sequences of ``sequence_length`` tokens per optimizer step.

        Raises ValueError if `batch_tokens` is no multiple of it, or `micro_batch` does not divide the sequences.
        """
        if self.batch_tokens % sequence_length:
            raise ValueError(
                f"train.batch_tokens is {self.batch_tokens}, which is not a multiple of the sequence length {sequence_length}; "
                f"use {max(1, round(self.batch_tokens / sequence_length)) * sequence_length}"
            )
        sequences = self.batch_tokens // sequence_length
        if sequences % self.micro_batch:
            divisors = [d for d in range(1, sequences + 1) if sequences % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.micro_batch))
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}, which does not divide the {sequences} sequences of a step; use {nearest}"
            )
        return sequences
