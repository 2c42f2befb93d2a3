"""Token shards in memory, for tests of what is packed from them; they can be made to grow."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from anarcho_tokenize import ShardError

EOT, PAD = 0, 1


class MemoryShards:
    """Shards of documents: lists of ids, which are kept from EOT and PAD; texts get their end-of-text here."""

    directory = Path("data/train")
    eot_id = EOT
    pad_id = PAD
    damaged = ()
    damaged_tokens = 0

    def __init__(self, shards: list[list[list[int]]], *, kind: str = "text", visible: int | None = None) -> None:
        self.kind = kind
        self._all = [[[*document, EOT] if kind == "text" else document for document in shard] for shard in shards]
        self._appended = len(shards) if visible is None else visible
        self.evicted: set[int] = set()
        self._take()

    def append(self, shards: int) -> None:
        """Let so many more shards be found by the next refresh."""
        self._appended = min(self._appended + shards, len(self._all))

    def refresh(self) -> None:
        self._take()

    def _take(self) -> None:
        self.complete = self._appended == len(self._all)
        shards = self._all[: self._appended]
        self.shard_starts = [0, *accumulate(sum(map(len, shard)) for shard in shards)]
        self.documents = [document for shard in shards for document in shard]
        self.num_tokens, self.num_documents = self.shard_starts[-1], len(self.documents)
        self.num_bytes = 3 * self.num_tokens
        self._ids = np.array([token for document in self.documents for token in document], dtype=np.uint16)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise ShardError(f"{start} to {stop} is not within the {self.num_tokens} tokens")
        for shard in self.evicted:
            if start < self.shard_starts[shard + 1] and stop > self.shard_starts[shard]:
                raise ShardError(f"shard {shard} was evicted")
        return self._ids[start:stop]

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Odd ids count."""
        return (self.tokens(start, stop) % 2).astype(np.uint8)

    def shard_documents(self, number: int) -> npt.NDArray[np.int64]:
        lengths = [len(document) for document in self._all[number]]
        return self.shard_starts[number] + np.cumsum([0, *lengths], dtype=np.int64)
