"""Examples from any source: files, folders and globs, the Hugging Face Hub, https, and weighted mixtures of them.

`Examples` streams in constant memory, in a fixed order, and can go on exactly where it was: its `position` is a few integers. Nothing that
is wrong with the data stops it: whatever is not as expected comes as a `BadRow` with its place, for quarantine, and rows that a filter
leaves out come as `Dropped`. `read_documents` is for scripts: texts alone, and an error at the first bad row.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from anarcho_tokenize.config import REMOTE, DataConfig
from anarcho_tokenize.encoded import EncodedRow
from anarcho_tokenize.errors import SourceError
from anarcho_tokenize.feeds import Catalog, Feed, Place, Rows, local_catalog
from anarcho_tokenize.files import EMBEDDED, find_files, require_modules
from anarcho_tokenize.filters import EMPTY, Reason
from anarcho_tokenize.judging import Judged, Taken, Verdict, judge
from anarcho_tokenize.mixture import next_source
from anarcho_tokenize.reading import Fault, Row
from anarcho_tokenize.rows import Content
from anarcho_tokenize.transport import NetworkError

__all__ = [
    "EMBEDDED",
    "BadRow",
    "Dropped",
    "Example",
    "Examples",
    "NetworkError",
    "check_source",
    "find_files",
    "is_remote",
    "read_documents",
]

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row that is taken."""

    content: Content | EncodedRow
    num_bytes: int
    """UTF-8 bytes of its texts."""
    digest: bytes
    """`digest_of` the content, 32 bytes."""
    source: int
    """Number of its source in `DataConfig.mixture`."""
    repeated: bool
    """Whether it is of a later pass over its source."""
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """What could not be read as a row, for quarantine."""

    place: str
    """`file:line`, `file, row n`, or the file where there is no more to be read of it."""
    reason: str
    """What was found and what was expected, as a sentence."""
    excerpt: str
    """Its beginning, at most 200 characters."""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" if self.reason[:1].isupper() else f"{self.place} {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that a filter leaves out."""

    source: int
    """Number of its source in `DataConfig.mixture`."""
    reason: Reason


class Recording(Protocol):
    """Rows that were read and judged before."""

    def catalog(self, source: int) -> Callable[[str | None], Catalog]:
        """Gives the files of a source of the mixture, as they were then."""
        ...

    def files(self, source: int) -> Callable[[int, Place], Rows]:
        """Opens what was recorded of a file of a source, by the file's number, at a place."""
        ...


class Examples:
    """Iterates over a source or a mixture.

    `position` goes on where another one was. `is_duplicate` is asked, if `config.deduplicate`, whether it has seen a key of 16 bytes, once
    for each row that the filters have let through. `on_retry` is told in a line of each network failure that is waited for. A `recording`
    of the rows is read in place of the sources.

    Iterating raises SourceError where nothing more can be read (a changed source, a missing module, a disk that fails), and NetworkError
    after the last attempt; files that do not exist are a FileNotFoundError at construction.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        position: Mapping[str, Any] | None = None,
        is_duplicate: Callable[[bytes], bool] | None = None,
        on_retry: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] | None = None,
        recording: Recording | None = None,
    ) -> None:
        self._config = config
        self._is_duplicate = is_duplicate if config.deduplicate else None
        self._feeds = [
            open_feed(config, number, on_retry=on_retry, sleep=sleep) for number in range(len(config.mixture))
        ]
        for feed in self._feeds if recording is not None else ():
            assert recording is not None
            feed.find, feed.recorded = recording.catalog(feed.number), recording.files(feed.number)
        if position is not None:
            self._restore(position)
        for feed in self._feeds:
            if not is_remote(feed.source.source):
                feed.open()

    def __iter__(self) -> Iterator[Example | BadRow | Dropped]:
        is_over = self._is_over
        while not is_over and (feed := self._next_feed()) is not None:
            row = feed.read()
            if row is not None:
                yield self._example(feed, row)
                continue
            feed.end_pass()
            is_over = self._is_over

    @property
    def position(self) -> dict[str, Any]:
        """Where reading is, as JSON: `Examples` with it yields what this one would yield from now on."""
        sources = [{"identity": feed.identity, "place": asdict(feed.place)} for feed in self._feeds]
        return {"version": _VERSION, "sources": sources}

    @property
    def progress(self) -> tuple[int, int | None]:
        """Bytes read, as stored on disk, and about how many it will be in all, None where unknown."""
        parts = [feed.progress() for feed in self._feeds]
        done = sum(read for read, _ in parts)
        if len(parts) == 1:
            return parts[0]
        sizes = [size for _, size in parts if size is not None]
        if len(sizes) < len(parts):
            return done, None
        shares = [read / size if size else 1.0 for read, size in parts]
        share = max(shares) if self._config.mixture_end == "first" else min(shares)
        return done, max(done, round(done / share)) if share else sum(sizes)

    @property
    def _is_over(self) -> bool:
        ended = (feed.place.passes > 0 for feed in self._feeds)
        return any(ended) if self._config.mixture_end == "first" else all(ended)

    def _next_feed(self) -> Feed | None:
        if len(self._feeds) == 1:
            return self._feeds[0]
        number = next_source(
            (feed.place.taken_bytes for feed in self._feeds),
            (feed.source.weight for feed in self._feeds),
            candidates=(not feed.place.is_done for feed in self._feeds),
        )
        return None if number is None else self._feeds[number]

    def _example(self, feed: Feed, row: Row) -> Example | BadRow | Dropped:
        verdict = self._verdict(feed, row)
        if isinstance(verdict, Fault):
            return BadRow(place=row.place, reason=verdict.reason, excerpt=verdict.excerpt)
        if not isinstance(verdict, Taken):
            return Dropped(source=feed.number, reason=verdict)
        passes = feed.place.passes
        if self._is_duplicate is not None and self._is_duplicate(_key(verdict.digest, passes)):
            return Dropped(source=feed.number, reason="duplicate")
        feed.place.taken_bytes += verdict.num_bytes
        return Example(
            content=verdict.content,
            num_bytes=verdict.num_bytes,
            digest=verdict.digest,
            source=feed.number,
            repeated=passes > 0,
            place=row.place,
        )

    def _verdict(self, feed: Feed, row: Row) -> Verdict:
        if isinstance(row.value, Judged):
            return row.value.verdict
        return judge(self._config, feed.source, row.value, text_field=feed.text_field)

    def _restore(self, position: Mapping[str, Any]) -> None:
        sources = position.get("sources", ())
        if position.get("version") != _VERSION or len(sources) != len(self._feeds):
            raise SourceError(
                f"The position to go on from is of version {position.get('version')} and {len(sources)} sources; expected version "
                f"{_VERSION} and {len(self._feeds)}, as in data.sources."
            )
        for feed, state in zip(self._feeds, sources, strict=True):
            feed.identity, feed.place = state["identity"], Place(**state["place"])


def read_documents(
    spec: str | os.PathLike[str], *, text_field: str | None = None, document_separator: str | None = None
) -> Iterator[str]:
    """Yield the documents of a source: `embedded`, a file, a glob, a directory (searched to any depth), `https://..` or `hf://..`.

    A .txt file is one document (of more than 16 MiB several), unless `document_separator` splits it. `text_field` is the key (jsonl) or
    column (parquet) of the text; `text` or else `content` when not given. Documents without any text are left out.

    Raises FileNotFoundError for what does not exist, SourceError for content that cannot be read as expected or holds no document;
    both while iterating.
    """
    config = DataConfig(source=os.fspath(spec), text_field=text_field, document_separator=document_separator)
    found = False
    for example in Examples(config):
        if isinstance(example, Example):
            found = True
            yield str(example.content)
        elif isinstance(example, BadRow) and example.reason != EMPTY.reason:
            raise SourceError(str(example))
    if not found:
        raise SourceError(f"{os.fspath(spec)} holds no text; expected at least one document that is not empty.")


def is_remote(spec: str) -> bool:
    """Whether a source is read through the network."""
    return spec.startswith(REMOTE)


def check_source(config: DataConfig) -> None:
    """Look at what can be known of a configuration's sources before they are read, without the network.

    Raises FileNotFoundError for what does not exist, and SourceError for unknown kinds of file, files that cannot be of `config.kind`,
    names that are not well formed, and missing modules.
    """
    for source in config.mixture:
        if is_remote(source.source):
            from anarcho_tokenize.hub import check_remote

            check_remote(source.source)
            continue
        for file in local_catalog(source.source, kind=config.kind).files:
            require_modules(file)
            if file.form not in (".txt", EMBEDDED):
                continue
            if config.kind != "text":
                raise SourceError(
                    f"{file.name} is plain text, but data.kind is {config.kind!r}; expected .jsonl or .parquet."
                )
            if source.min_score is not None or source.languages:
                raise SourceError(
                    f"{file.name} is plain text without the key that a filter looks at; expected .jsonl or .parquet."
                )


def open_feed(
    config: DataConfig,
    number: int,
    *,
    on_retry: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Feed:
    """The reader of one source of the configuration, which has not looked for its files yet."""
    source = config.mixture[number]
    spec = source.source

    def find(revision: str | None) -> Catalog:
        if not is_remote(spec):
            return local_catalog(spec, kind=config.kind)
        from anarcho_tokenize.hub import remote_catalog

        retries = config.network_retries
        return remote_catalog(spec, revision=revision, retries=retries, on_retry=on_retry, sleep=sleep)

    return Feed(source, number, config.kind, config.max_document_bytes, find)


def start_of(identities: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """The position before the first row of sources that must be these."""
    return {
        "version": _VERSION,
        "sources": [{"identity": identity, "place": asdict(Place())} for identity in identities],
    }


def _key(digest: bytes, passes: int) -> bytes:
    """What names a row among those of all sources, another one in each pass."""
    return (hashlib.sha256(passes.to_bytes(8) + digest).digest() if passes else digest)[:16]
