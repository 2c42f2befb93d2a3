"""What generation needs of a framework: reading tokens into a cache, and drawing from the logits; free of any framework.

`Stepper` is implemented by `anarcho_model.generate.stepping.torch` and `.mlx`; `batching`, `texts` and `speculation` do
the rest for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from anarcho_model.config import ModelConfig
from anarcho_model.errors import NotFiniteError
from anarcho_model.generate.draws import Draws
from anarcho_model.generate.sampling import SamplingConfig

__all__ = ["NO_TOKEN", "Drawing", "Model", "NewToken", "Stepper", "Stepping", "alike", "require_tokens"]

NO_TOKEN = -1
"""Stands for the token of a row whose logits are NaN or infinite, so that this is read with the tokens, at no further wait."""


@runtime_checkable
class Model(Protocol):
    """A GPT of either framework."""

    config: ModelConfig


class NewToken(NamedTuple):
    """A token that was drawn; log-probabilities are the model's own in nats, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first, as many as were asked for."""


class Drawing(NamedTuple):
    """How one row's next token is drawn."""

    config: SamplingConfig
    draws: Draws
    top_logprobs: int = 0


@runtime_checkable
class Stepper(Protocol):
    """Rows of tokens, each with a length of its own, that a model reads on. Logits are the framework's arrays."""

    def release(self) -> None:
        """Leave what can be used again to the next text."""
        ...

    def read(self, parts: Sequence[Sequence[int]], *, rows: Sequence[int], lengths: Sequence[int]) -> Any:
        """Read these tokens of each row after its first `length`; the logits (rows, vocab) after the last of each."""
        ...

    def step(self, tokens: Sequence[int | None], *, lengths: Sequence[int]) -> Any:
        """Read one token of each row that is not None; the logits (going, vocab) after them, without the other rows."""
        ...

    def read_all(self, tokens: Sequence[int], *, length: int) -> Any:
        """Read a few tokens of row 0 after its first `length`; the logits (tokens, vocab) after each."""
        ...

    def draw(self, logits: Any, drawings: Sequence[Drawing], *, rows: Sequence[int] | None = None) -> list[int]:
        """The next token of these rows of the logits, one for each drawing; None takes all rows.

        Raises NotFiniteError where logits are NaN or infinite.
        """
        ...

    def draw_with_logprobs(
        self, logits: Any, drawings: Sequence[Drawing], *, rows: Sequence[int] | None = None
    ) -> list[NewToken]:
        """As `draw`, with log-probabilities; NO_TOKEN for a row whose logits are NaN or infinite, and the others as ever."""
        ...

    def forget(self, row: int) -> None:
        """Zero what the cache holds for this row: NaN would reach later texts through places that are masked."""
        ...


@runtime_checkable
class Stepping(Protocol):
    """Makes steppers, such as a class of them."""

    def __call__(self, model: Any, *, rows: int, capacity: int) -> Stepper:
        """Take memory for `rows` x `capacity` tokens."""
        ...


def alike(configs: Sequence[SamplingConfig]) -> list[list[int]]:
    """Rows by the settings that decide how they are drawn."""
    groups: dict[object, list[int]] = {}
    for row, config in enumerate(configs):
        key = () if config.greedy else (config.temperature, config.top_k, config.top_p, config.min_p)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def require_tokens(tokens: list[int]) -> list[int]:
    """The tokens; raises NotFiniteError where one of them is NO_TOKEN."""
    if NO_TOKEN in tokens:
        raise NotFiniteError
    return tokens
