"""How much of its blocks a rank has to encode where not all of the sources is wanted: with `max_tokens`, and of a mixture that ends with
its first source.

The text of other ranks' blocks is guessed from the rank's own, by the bytes as they are stored. A wrong guess costs time and nothing else:
what is too much is left aside by the merge, and what is missing it reads from the source.
"""

import math
from collections.abc import Sequence

from anarcho_tokenize.blocks import MOST_UNPACKED, Block
from anarcho_tokenize.config import DataConfig

_MARGIN = 1.05


class _Progress:
    """Of one source."""

    def __init__(self, blocks: Sequence[Block], *, rank: int, weight: float) -> None:
        self.weight = weight
        self.own = [block for block in blocks if block.rank == rank]
        self.begun = 0
        """Own blocks begun."""
        self.is_in_block = False
        """Whether the last of these is still read."""
        self.taken_bytes = 0
        self.stored_bytes = 0
        self.encoded_bytes = 0
        self.encoded_tokens = 0
        self._others: list[tuple[int, int]] = []
        sizes = unknown = 0
        for block in blocks:
            if block.rank == rank:
                self._others.append((sizes, unknown))
            else:
                sizes, unknown = sizes + (block.size or 0), unknown + (block.size is None)
        self._others.append((sizes, unknown))

    @property
    def is_read(self) -> bool:
        """Whether all own blocks have been read."""
        return self.begun == len(self.own) and not self.is_in_block

    def level(self, *, at_end: bool) -> float:
        """Text of the source up to where this rank is, or up to its end, over the source's weight."""
        sizes, unknown = self._others[-1 if at_end else max(0, self.begun - 1)]
        if not self.own and at_end:
            return math.inf if unknown else sizes * MOST_UNPACKED / self.weight
        if not self.stored_bytes:
            return self.taken_bytes / self.weight
        others = sizes + unknown * self.stored_bytes / max(1, self.begun)
        return self.taken_bytes * (1 + others / self.stored_bytes) / self.weight

    def tokens(self, level: float) -> float:
        """Training tokens of the source up to a level."""
        return self.encoded_tokens / self.encoded_bytes * level * self.weight if self.encoded_bytes else 0.0


class Forecast:
    """Chooses a rank's next block, until there should be enough."""

    def __init__(self, config: DataConfig, blocks: Sequence[Sequence[Block]], *, rank: int) -> None:
        self._max_tokens = config.max_tokens
        self._ends_first = config.mixture_end == "first" and len(blocks) > 1
        self._sources = [
            _Progress(one, rank=rank, weight=source.weight) for one, source in zip(blocks, config.mixture, strict=True)
        ]

    def next_block(self) -> Block | None:
        """Of the source that is furthest behind its weight; None where nothing more is needed."""
        if self.is_enough():
            return None
        levels = [
            (one.level(at_end=False), number) for number, one in enumerate(self._sources) if one.begun < len(one.own)
        ]
        if not levels:
            return None
        source = self._sources[min(levels)[1]]
        block = source.own[source.begun]
        self.begin(block)
        return block

    def begin(self, block: Block) -> None:
        """Note that a block is read from now on."""
        source = self._sources[block.source]
        source.begun = 1 + source.own.index(block)
        source.is_in_block = True

    def end(self, block: Block) -> None:
        """Note that it was read to its end."""
        self._sources[block.source].is_in_block = False

    def read(self, source: int, *, taken_bytes: int, stored_bytes: int) -> None:
        """Note text that was read, and the bytes that held it."""
        self._sources[source].taken_bytes += taken_bytes
        self._sources[source].stored_bytes += stored_bytes

    def encoded(self, source: int, *, taken_bytes: int, train_tokens: int) -> None:
        """Note training tokens, and the text, that of validation included, beside which they were."""
        self._sources[source].encoded_bytes += taken_bytes
        self._sources[source].encoded_tokens += train_tokens

    def is_enough(self) -> bool:
        """Whether the rows of all ranks up to where this one is should do."""
        levels = [one.level(at_end=False) for one in self._sources if not one.is_read]
        if not levels:
            return True
        level = min(levels)
        if self._max_tokens is not None:
            tokens = sum(one.tokens(level) for one in self._sources)
            if tokens >= self._max_tokens * _MARGIN:
                return True
        ends = [one.level(at_end=True) for one in self._sources if one.is_read] if self._ends_first else []
        return bool(ends) and level > min(ends) * _MARGIN
