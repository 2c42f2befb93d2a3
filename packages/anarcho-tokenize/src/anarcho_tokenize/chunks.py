"""Rows in chunks: up to about 1 MiB of text that is encoded at once, with what must be known of it to go on behind it.

Each row is given its part here. It belongs to validation by the sha256 of its content alone, so neither its place, nor the tokenizer, nor
other rows move it: the same text never is in both parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from anarcho_tokenize.encoded import EncodedRow, NotRecordedError
from anarcho_tokenize.rows import Content
from anarcho_tokenize.sources import BadRow, Dropped, Example

TRAIN = "train"
VALIDATION = "validation"
CHUNK_BYTES = 2**20
_TOKEN_BYTES = 4
CHUNK_ROWS = 4096


class RowSource(Protocol):
    """What is prepared, such as `Examples`."""

    def __iter__(self) -> Iterator[Example | BadRow | Dropped]:
        """The rows."""
        ...

    @property
    def position(self) -> dict[str, Any]:
        """Where to go on after what was yielded, as JSON."""
        ...

    @property
    def progress(self) -> tuple[int, int | None]:
        """Bytes of the source so far, and in all, where that is known."""
        ...


@dataclass(kw_only=True)
class Counts:
    """What has been met in the source."""

    rows: int = 0
    """All rows."""
    quarantined: int = 0
    """Rows that cannot be used."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    validation: int = 0
    """Rows that are kept from training."""

    def copy(self) -> "Counts":
        """The counts as they are now."""
        return Counts(**{**vars(self), "dropped": dict(self.dropped)})


class Chunk:
    """Some rows on their way: contents to encode, and what is known of each."""

    def __init__(self, number: int, *, full_bytes: int) -> None:
        self.number = number
        self._full_bytes = full_bytes
        self.contents: list[Content | EncodedRow] = []
        self.parts: list[str] = []
        """The part of each content."""
        self.bad: list[BadRow] = []
        self.rows = 0
        self._bytes = 0
        self._last_new: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether a new chunk should be begun."""
        return self._bytes >= self._full_bytes or self.rows >= CHUNK_ROWS

    def add(self, content: Content | EncodedRow, part: str, num_bytes: int, *, is_repeated: bool) -> None:
        """Append a row to encode."""
        if not is_repeated:
            self._last_new = len(self.contents)
        self.contents.append(content)
        self.parts.append(part)
        self._bytes += num_bytes

    def seal(self, source: RowSource, counts: Counts) -> "Chunk":
        """Note what holds behind the last row."""
        self.position, self.progress, self.counts = source.position, source.progress, counts.copy()
        return self

    def cut_tail(self, *, fraction: float) -> None:
        """Keep the end of the last text from training, where a few texts all hashed into the training part.

        A text that is there twice, or that was read in an earlier pass, is trained on as a whole, so its end cannot be kept from it.
        Raises NotRecordedError where the text is there as tokens alone.
        """
        last = self._last_new
        if last is not None and isinstance(row := self.contents[last], EncodedRow) and row.documents[0].mask is None:
            raise NotRecordedError
        if last is None or not isinstance(text := self.contents[last], str) or self.contents.count(text) > 1:
            return
        head, tail = _cut_tail(text, fraction=fraction)
        halves = [(half, part) for half, part in ((head, TRAIN), (tail, VALIDATION)) if half]
        self.contents[last : last + 1] = [half for half, _ in halves]
        self.parts[last : last + 1] = [part for _, part in halves]


class ChunkReader:
    """Iterates the chunks of a source."""

    def __init__(
        self, source: RowSource, *, counts: Counts, first: int, shard_tokens: int, validation_fraction: float
    ) -> None:
        """`counts` are those of the chunks before number `first`; a chunk holds no more than about `shard_tokens`."""
        self.number = first
        """Of the chunk that is read now."""
        self._source = source
        self._chunk_bytes = min(CHUNK_BYTES, _TOKEN_BYTES * shard_tokens)
        self._counts = counts.copy()
        self._validation_fraction = validation_fraction

    def __iter__(self) -> Iterator[Chunk]:
        """Each chunk, given out when it is known whether another text follows."""
        chunk, full = self._new_chunk(), None
        for item in self._source:
            if full is not None and isinstance(item, Example):
                yield full
                full = None
            self._read(item, chunk)
            if chunk.is_full:
                if full is not None:
                    yield full
                full = chunk.seal(self._source, self._counts)
                self.number += 1
                chunk = self._new_chunk()
        # No empty chunk follows: an attempt that goes on at the end would count one more than another.
        for last in (full, chunk.seal(self._source, self._counts) if chunk.rows else None):
            if last is not None:
                if not self._counts.validation and self._validation_fraction:
                    last.cut_tail(fraction=self._validation_fraction)
                yield last

    def _new_chunk(self) -> Chunk:
        return Chunk(self.number, full_bytes=self._chunk_bytes)

    def _read(self, item: Example | BadRow | Dropped, chunk: Chunk) -> None:
        chunk.rows += 1
        self._counts.rows += 1
        if isinstance(item, BadRow):
            self._counts.quarantined += 1
            chunk.bad.append(item)
        elif isinstance(item, Dropped):
            self._counts.dropped[item.reason] = self._counts.dropped.get(item.reason, 0) + 1
        elif not is_validation(item.digest, fraction=self._validation_fraction):
            chunk.add(item.content, TRAIN, item.num_bytes, is_repeated=item.repeated)
        elif not item.repeated:
            self._counts.validation += 1
            chunk.add(item.content, VALIDATION, item.num_bytes, is_repeated=False)


def is_validation(digest: bytes, *, fraction: float) -> bool:
    """Whether a row is kept from training: the sha256 of its content, read as a number below 1, is below the fraction."""
    return int.from_bytes(digest[:8]) < fraction * 2**64


def _cut_tail(text: str, *, fraction: float) -> tuple[str, str]:
    """The text without about its last ``fraction``, and that; cut at a line's end where there is one, so that no word is cut."""
    place = round(len(text) * (1 - fraction))
    line_end = text.rfind("\n", 0, place) + 1
    cut = line_end if line_end > place // 2 else place
    return text[:cut], text[cut:]
