"""What a training run does and when, and what its loss is: settings free of any framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

PreferenceLossName = Literal["dpo", "ipo", "simpo", "orpo", "kto"]

LARGEST_SEED = 2**63 - 1
"""What the generators of both frameworks take."""
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""The largest number of float32, in which losses are computed."""
LONGEST_TIMEOUT_SECONDS = 1e9
"""Thirty years; the clocks of the libraries that wait end at some multiple of it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batch, evaluation, checkpoints and arithmetic of one run."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    epochs: float | None = None
    """How often the run sees its training data, in place of `steps`; a last step that is not full goes on with the beginning.

    The data must be there before the training begins: a stream cannot be counted."""
    batch_tokens: int = 65536
    """Tokens per optimizer step, over all micro-batches; a multiple of the sequence length."""
    sequence_length: int | None = None
    """Tokens per training sequence; left out, the model's context length."""
    length_warmup: float = 0.0
    """Share of the steps in which training sequences grow: they begin with `first_length` tokens and double at equal intervals.

    0 has them whole from the first step. A step has the same tokens in any case, cut into more sequences, so memory stays about the same;
    each length is compiled anew. Early on, short sequences teach as much for less attention (arXiv:2012.15832, arXiv:2108.06084).

    For text alone. The utilisation that is told counts the attention of whole sequences."""
    first_length: int = 256
    """Tokens of the first sequences where `length_warmup` is not 0; the sequence length halved once or more."""
    micro_batch: int | Literal["auto"] = 1
    """Sequences that go through the model at once; changes memory and speed, never the gradient's meaning.

    `auto` is the largest number that memory has room for and that is of use, found before the first step."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    eval_every: int = 250
    """Optimizer steps between evaluations on the validation text; 0 evaluates only at the end."""
    eval_tokens: int | None = None
    """Validation tokens of an evaluation during training; left out, all. The last evaluation always reads all."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; 0 writes only the last and the best one."""
    checkpoint_minutes: float = 0.0
    """Minutes after which the newest checkpoint is too old and another one is written, besides those by steps; 0 leaves that out.

    Such a checkpoint is one to resume from, never one that a fault rolls back to, so what is learned does not depend on the clock."""
    keep_last: int = 2
    """How many of the newest checkpoints stay; the best one stays in any case."""
    save_in_background: bool | Literal["auto"] = "auto"
    """Whether training goes on while a copy of the state is written, where there is memory for the copy.

    `auto` does so on a GPU: on a CPU the writing takes the time of the very cores that compute."""
    early_stopping_patience: int = 0
    """Evaluations without a better validation loss after which the run stops; 0 never stops early."""
    early_stopping_min_delta: float = 0.0
    """Improvement of the validation loss, in nats per token, that counts as better."""
    log_every: int = 10
    """Optimizer steps between lines of the metrics file."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data, from 0 to 2^63 - 1."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the matrix products; weights and optimizer state are float32 in any case but `lean`."""
    narrow_residual: bool = False
    """Whether what passes from block to block, the residual stream, has the type of the matrix products, too; by default it is float32.

    Norms and sums are bound by memory: an H100 saves a twentieth of the time, and with gradient checkpointing half of what is kept."""
    float8: bool = False
    """Whether training multiplies in 8-bit floats where layers are wide enough to gain, for somewhat coarser gradients.

    An H100 is about a fifth faster at the width of 768, a third at 2048; one pass over books cost the reference model 0.004 bits per byte.
    For models that are compiled for NVIDIA GPUs of compute capability 8.9 or later, with `precision` bfloat16, and not for an adapter.
    A micro-batch whose tokens are no multiple of 16, an output layer whose ids are none, and queries, keys and values with QK-norm stay in
    bfloat16. Checkpoints, and what is made of them, are as without it. Where each process has the whole model, a run's own validation
    multiplies as its training does, for which alone the model is compiled."""
    lean: bool = False
    """Whether weights and optimizer state are bfloat16, too, rounded stochastically: half of their memory, for a somewhat higher loss.

    For one process of PyTorch whose matrix products are bfloat16, and not for an adapter."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the model runs through torch.compile; `auto` compiles where it pays for itself over the run.

    On a CPU with several threads a compiled run is not repeatable to the last bit; an uncompiled one is."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Whether the passes over a micro-batch become CUDA graphs, which start their kernels as one, in one process of PyTorch.

    `auto` records them where the host takes longer to start the kernels than the GPU to run them: with small models or micro-batches."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Whether each block's activations are computed again in the backward pass instead of being kept.

    `auto` does so where a useful number of sequences would not fit otherwise, found before the first step."""
    update_in_backward: bool = False
    """Whether a block's weights are updated within the backward pass, as soon as their gradients are there, which then make room.

    For one process of PyTorch without clipping (`grad_clip = 0`); it saves memory where a step has one micro-batch. Where a gradient is not
    finite, its block alone is left as it is."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while a model is tuned on conversations (NEFTune), usually 5 to 15; 0 adds none.

    It is uniform in `±alpha / sqrt(L * dim)`, for conversations of L tokens."""
    strategy: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    """How several processes of PyTorch share the model: `ddp` has it whole in each, `fsdp` a shard of every weight and of its state,
    `hybrid` such a shard of a model for each machine.

    `auto` is `ddp` where weights, gradients and optimizer state fit each device, else `hybrid` where they fit all devices of each of
    several machines, else `fsdp`."""
    rank_timeout_seconds: float = 600.0
    """How long a process of several waits for an answer of the others before it takes them for lost, saves and ends; in seconds."""

    def __post_init__(self) -> None:
        if isinstance(self.micro_batch, str) and self.micro_batch != "auto":
            raise ValueError(
                f"train.micro_batch is {self.micro_batch!r}; expected a whole number of at least 1, or 'auto'"
            )
        if self.gradient_checkpointing not in (True, False, "auto"):
            raise ValueError(
                f"train.gradient_checkpointing is {self.gradient_checkpointing!r}; expected true, false or 'auto'"
            )
        if self.cuda_graphs not in (True, False, "auto"):
            raise ValueError(f"train.cuda_graphs is {self.cuda_graphs!r}; expected true, false or 'auto'")
        if self.save_in_background not in (True, False, "auto"):
            raise ValueError(f"train.save_in_background is {self.save_in_background!r}; expected true, false or 'auto'")
        for name in ("steps", "batch_tokens", "micro_batch", "keep_last", "log_every"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected a whole number of at least 1")
        for name in ("sequence_length", "eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"train.{name} is {value}; expected a whole number of at least 1, or leave the key out"
                )
        for name in ("eval_every", "checkpoint_every", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected zero or a positive whole number")
        if not 0 <= self.length_warmup <= 1:
            raise ValueError(f"train.length_warmup is {self.length_warmup}; expected a share of the steps, from 0 to 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"train.seed is {self.seed}; expected a whole number from 0 to 2**63 - 1")
        if self.lean and self.precision not in ("auto", "bfloat16"):
            raise ValueError(
                f"train.lean is true and train.precision is {self.precision!r}; expected 'bfloat16' or 'auto'"
            )
        if self.float8 and self.precision not in ("auto", "bfloat16"):
            raise ValueError(
                f"train.float8 is true and train.precision is {self.precision!r}; expected 'bfloat16' or 'auto'"
            )
        if self.float8 and self.compile == "off":
            raise ValueError("train.float8 is true and train.compile is 'off'; expected 'on' or 'auto'")
        if self.update_in_backward and self.grad_clip:
            raise ValueError(
                f"train.update_in_backward is true and train.grad_clip is {self.grad_clip}, but the norm of all gradients is known only "
                "when all are there; expected grad_clip = 0"
            )
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ValueError(f"train.epochs is {self.epochs}; expected a positive number, or leave the key out")
        for name in ("grad_clip", "early_stopping_min_delta", "neftune_alpha", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"train.{name} is {getattr(self, name)}; expected zero or a positive number")
        if not 0 < self.rank_timeout_seconds <= LONGEST_TIMEOUT_SECONDS:
            raise ValueError(
                f"train.rank_timeout_seconds is {self.rank_timeout_seconds}; "
                f"expected a positive number of seconds, at most {LONGEST_TIMEOUT_SECONDS:,.0f}"
            )
        choices = {
            "precision": ("auto", "float32", "bfloat16", "float16"),
            "compile": ("auto", "on", "off"),
            "strategy": ("auto", "ddp", "fsdp", "hybrid"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"train.{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")

    def length_at(self, step: int, sequence_length: int) -> int:
        """Tokens of a training sequence in the step after ``step``, where whole ones have ``sequence_length``.

        Raises ValueError if `first_length` is not ``sequence_length`` halved so many times.
        """
        if not self.length_warmup:
            return sequence_length
        doublings = (sequence_length // self.first_length).bit_length() - 1 if self.first_length > 0 else 0
        if doublings < 1 or self.first_length << doublings != sequence_length:
            halves = [sequence_length >> n for n in range(1, 12) if sequence_length % 2**n == 0]
            expected = f"one of {', '.join(map(str, halves))}" if halves else "train.length_warmup = 0"
            raise ValueError(
                f"train.first_length is {self.first_length}, from which doubling does not lead to sequences of {sequence_length} tokens; "
                f"expected {expected}"
            )
        # Rounded, because 0.3 * 20 / 3 is below 2.
        done = round(step * doublings / (self.length_warmup * self.steps), 9)
        return self.first_length << min(doublings, int(done))

    def steps_of_epochs(self, *, samples_per_epoch: int, samples_per_step: int) -> int:
        """Optimizer steps in which the run sees each sample `epochs` times; `steps` where it is not given."""
        if self.epochs is None:
            return self.steps
        # Rounded, because 0.1 * 30 is 3.0000000000000004.
        return max(1, math.ceil(round(self.epochs * samples_per_epoch, 6) / samples_per_step))

    @property
    def fixed_micro_batch(self) -> int:
        """`micro_batch` as a number; raises ValueError where it is yet to be found."""
        if self.micro_batch == "auto":
            raise ValueError(
                "train.micro_batch is 'auto', which is to be found before the training begins; expected a number here"
            )
        return self.micro_batch

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
        if self.micro_batch != "auto" and sequences % self.micro_batch:
            start = min(self.micro_batch, sequences)
            around = (size for distance in range(start) for size in (start - distance, start + distance))
            nearest = next(size for size in around if sequences % size == 0)
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}, which does not divide the {sequences} sequences of a step; use {nearest}"
            )
        return sequences


_USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
_USUAL_NORMALIZATION = {"dpo": False, "ipo": True, "simpo": True, "orpo": True, "kto": False}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """The loss of preference tuning; `anarcho_train.losses.preference` has the formulas and their papers."""

    loss: PreferenceLossName = "dpo"
    """What is learned from a pair of answers; `simpo` and `orpo` need no reference."""
    beta: float | None = None
    """Scale of the rewards (of ORPO: weight of the odds ratio); left out, 0.1, and 2.0 for `simpo`.

    The larger, the closer `dpo`, `ipo` and `kto` stay to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be labelled the wrong way round, below 0.5; for `dpo` and `simpo`."""
    gamma: float = 1.0
    """Margin by which the chosen answer's reward should exceed the rejected one's; for `simpo`."""
    length_normalization: bool | None = None
    """Whether log-probabilities are divided by the answer's tokens; left out, as is usual: not for `dpo` and `kto`, else yes."""
    desirable_weight: float = 1.0
    """Weight of the chosen answers; for `kto`."""
    undesirable_weight: float = 1.0
    """Weight of the rejected answers; for `kto`."""

    def __post_init__(self) -> None:
        names = get_args(PreferenceLossName)
        if self.loss not in names:
            raise ValueError(f"preference.loss is {self.loss!r}; expected one of {', '.join(names)}")
        if self.beta is not None and not (0 < self.beta <= FLOAT32_MAX):
            raise ValueError(
                f"preference.beta is {self.beta}; expected a positive number that float32 can hold, or leave the key out"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing is {self.label_smoothing}; expected at least 0 and below 0.5")
        for name in ("gamma", "desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) <= FLOAT32_MAX:
                raise ValueError(
                    f"preference.{name} is {getattr(self, name)}; expected zero or a positive number that float32 can hold"
                )
        self._require_meaning()

    def _require_meaning(self) -> None:
        """A setting that the loss does not read would be a silent mistake."""
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise ValueError(
                f"preference.label_smoothing is {self.label_smoothing}, which {self.loss} does not have; use 0, or dpo or simpo"
            )
        fixed = self.loss in ("simpo", "orpo", "kto")
        if fixed and self.length_normalization not in (None, _USUAL_NORMALIZATION[self.loss]):
            raise ValueError(
                f"preference.length_normalization is {self.length_normalization}, but {self.loss} is defined with "
                f"{_USUAL_NORMALIZATION[self.loss]}; leave the key out"
            )

    @property
    def scale(self) -> float:
        """`beta`, or the usual one of this loss."""
        return _USUAL_BETA[self.loss] if self.beta is None else self.beta

    @property
    def per_token(self) -> bool:
        """`length_normalization`, or what is usual for this loss."""
        return _USUAL_NORMALIZATION[self.loss] if self.length_normalization is None else self.length_normalization

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the log-probabilities of a reference."""
        return self.loss in ("dpo", "ipo", "kto")
