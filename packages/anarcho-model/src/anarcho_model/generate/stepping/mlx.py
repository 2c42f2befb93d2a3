"""A cache of keys and values, and reading tokens into it with MLX: what generation and the engine share.

Notable: a long prompt is read in chunks that are evaluated one by one, which bounds memory and the length of a command of
the GPU. A step reads all rows of the cache where at least half of them go on, for then nothing has to be copied. Lengths
are known before tokens are, so a step can be prepared while the one before it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from anarcho_model.generate.drawing.mlx import choose_tokens, draw_tokens, with_logprobs
from anarcho_model.generate.steps import Drawing, NewToken
from anarcho_model.mlx import GPT, KVCache

__all__ = ["Stepper"]

CHUNK_TOKENS = 512
"""Most tokens of each row that are read at a time."""
CLEARED_STEPS = 256
"""So often, memory that MLX keeps of freed arrays is let go of: as a text grows, so do they, and none fits the next."""


class Stepper:
    """Rows of tokens, each with a length of its own, that a model reads on."""

    def __init__(self, model: GPT, *, rows: int, capacity: int, kv_bits: int | None = None) -> None:
        """Take memory for `rows` x `capacity` tokens: each needs 2 x layers x key/value width elements.

        `kv_bits` of 4 or 8 store these elements quantised.
        """
        self.model, self.rows, self.steps = model, rows, 0
        self.cache = KVCache(model, batch=rows, capacity=capacity, bits=kv_bits)
        # Another thread may step: what is not evaluated belongs to the streams of the one that made it.
        mx.eval(self.cache.lengths, [(layer.keys.parts, layer.values.parts) for layer in self.cache.layers])

    def release(self) -> None:
        """Memory is let go of with the stepper."""

    def read(self, parts: Sequence[Sequence[int]], *, rows: Sequence[int], lengths: Sequence[int]) -> mx.array:
        """Read these tokens of each row after its first `length`; float32 logits (rows, vocab) after the last of each.

        Rows may be given tokens of different numbers; the longest must fit after every row's length.
        """
        width = max(map(len, parts))
        padded = mx.array([[*part, *[0] * (width - len(part))] for part in parts], dtype=mx.int32)
        ends = [len(part) - 1 for part in parts]
        found: list[mx.array] = []
        order: list[int] = []
        for start in range(0, width, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, width)
            hidden = self._hidden(padded[:, start:stop], rows=rows, lengths=[length + start for length in lengths])
            inside = [row for row, end in enumerate(ends) if start <= end < stop]
            if inside:
                order += inside
                found.append(hidden[mx.array(inside), mx.array([ends[row] - start for row in inside])])
            if stop < width:
                mx.eval(found, hidden)
        last = found[0] if len(found) == 1 else mx.concatenate(found)
        if order != sorted(order):
            last = last[mx.array(sorted(range(len(order)), key=order.__getitem__))]
        logits = self.model.unembed(last).astype(mx.float32)
        # Begun now, or a part of a prompt after which nothing is drawn would wait for the parts after it.
        mx.async_eval(logits)
        return logits

    def step(self, tokens: Sequence[int | None], *, lengths: Sequence[int]) -> mx.array:
        """Read one token of each row that is not None; float32 logits (going, vocab) after them, without the other rows.

        Rows and lengths are all of the cache's. What lies at and after the length of a row with None may be overwritten;
        such a length is less than the capacity.
        """
        going = [row for row, token in enumerate(tokens) if token is not None]
        taken = list(range(len(tokens))) if 2 * len(going) >= len(tokens) else going
        ids = mx.array([[tokens[row] or 0] for row in taken], dtype=mx.int32)
        logits = self.step_with(ids, rows=taken, lengths=[lengths[row] for row in taken])
        return logits if len(taken) == len(going) else logits[mx.array([taken.index(row) for row in going])]

    def step_with(self, tokens: mx.array, *, rows: Sequence[int], lengths: Sequence[int]) -> mx.array:
        """Read one token (rows, 1) of each of these rows, which need not be known yet; float32 logits (rows, vocab)."""
        hidden = self._hidden(tokens, rows=rows, lengths=lengths)
        return self.model.unembed(hidden[:, 0]).astype(mx.float32)

    def read_all(self, tokens: Sequence[int], *, length: int) -> mx.array:
        """Read a few tokens of row 0 after its first `length`; float32 logits (tokens, vocab) after each."""
        hidden = self._hidden(mx.array([list(tokens)], dtype=mx.int32), rows=[0], lengths=[length])
        return self.model.unembed(hidden[0]).astype(mx.float32)

    def draw(self, logits: mx.array, drawings: Sequence[Drawing], *, rows: Sequence[int] | None = None) -> list[int]:
        """The next token of these rows of the logits, one for each drawing; None takes all rows."""
        return draw_tokens(_some(logits, rows), configs=_configs(drawings), generators=_draws(drawings))

    def draw_with_logprobs(
        self, logits: mx.array, drawings: Sequence[Drawing], *, rows: Sequence[int] | None = None
    ) -> list[NewToken]:
        """As `draw`, with log-probabilities; NO_TOKEN for a row whose logits are NaN or infinite, and the others as ever."""
        logits = _some(logits, rows)
        tokens = choose_tokens(logits, configs=_configs(drawings), generators=_draws(drawings))
        return with_logprobs(tokens, logits, tops=[drawing.top_logprobs for drawing in drawings])

    def forget(self, row: int) -> None:
        """Zero what the cache holds for this row: NaN would reach later texts through places that are masked."""
        for store in (store for layer in self.cache.layers for store in (layer.keys, layer.values)):
            for part in store.parts:
                part[row] = 0

    def _hidden(self, tokens: mx.array, *, rows: Sequence[int], lengths: Sequence[int]) -> mx.array:
        self.steps += 1
        if self.steps % CLEARED_STEPS == 0:
            mx.clear_cache()
        cache = self.cache if list(rows) == list(range(self.rows)) else self.cache.select(rows)
        cache.lengths = mx.array(list(lengths), dtype=mx.int32)
        return self.model.hidden_states(tokens, cache=cache)


def _some(logits: mx.array, rows: Sequence[int] | None) -> mx.array:
    return logits if rows is None else logits[mx.array(list(rows))]


def _configs(drawings: Sequence[Drawing]) -> list:
    return [drawing.config for drawing in drawings]


def _draws(drawings: Sequence[Drawing]) -> list:
    return [drawing.draws for drawing in drawings]
