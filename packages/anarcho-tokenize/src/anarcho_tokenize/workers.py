"""Encodes chunks of rows in processes beside the reader, in order and with a bounded number of chunks under way.

Processes, because SentencePiece's Python side holds the interpreter's lock for much of the work. They are spawned, not forked, so that
they share nothing with a process that has threads, such as a trainer; and they end with it, however it ends.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

import numpy as np

from anarcho_tokenize.chat import encode_conversation, encode_preference
from anarcho_tokenize.encoded import EncodedDocument, EncodedRow
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.loading import AnyTokenizer, tokenizer_of_bytes
from anarcho_tokenize.rows import Content, Preference

_CHUNKS_PER_WORKER = 2


class KilledError(ShardError):
    """A process that encodes was killed; another attempt may fare better."""


Tag = TypeVar("Tag")


def encode(tokenizer: AnyTokenizer, content: Content | EncodedRow) -> tuple[EncodedDocument, ...]:
    """The documents of a row: of a text or a conversation one, of a preference the chosen and the rejected answer with their prompt."""
    if isinstance(content, EncodedRow):
        return content.documents
    if isinstance(content, str):
        return (EncodedDocument(np.append(tokenizer.encode_array(content), np.int32(tokenizer.eot_id)), None),)
    if isinstance(content, Preference):
        return tuple(EncodedDocument(ids, mask) for ids, mask in encode_preference(tokenizer, content))
    return (EncodedDocument(*encode_conversation(tokenizer, content)),)


class Encoder:
    """Encodes chunks of rows with `num_workers` processes, or with 0 in this one; a context manager."""

    def __init__(self, tokenizer: AnyTokenizer, *, num_workers: int) -> None:
        self._tokenizer = tokenizer
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        if num_workers:
            self._pool = ProcessPoolExecutor(
                num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(tokenizer.model_bytes, os.getpid()),
            )

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(
        self, chunks: Iterable[tuple[Tag, Sequence[Content | EncodedRow]]]
    ) -> Iterator[tuple[Tag, list[tuple[EncodedDocument, ...]]]]:
        """Yield each chunk's tag with its rows' documents, in order; chunks are taken only a few ahead of those that are yielded.

        Raises KilledError where a process is killed.
        """
        if self._pool is None:
            for tag, contents in chunks:
                yield tag, [encode(self._tokenizer, content) for content in contents]
            return
        waiting: deque[tuple[Tag, Future[list[tuple[EncodedDocument, ...]]]]] = deque()
        try:
            for tag, contents in chunks:
                waiting.append((tag, self._pool.submit(_encode_chunk, contents)))
                while len(waiting) > _CHUNKS_PER_WORKER * self._num_workers or (waiting and waiting[0][1].done()):
                    tag, future = waiting.popleft()
                    yield tag, future.result()
            while waiting:
                tag, future = waiting.popleft()
                yield tag, future.result()
        except BrokenProcessPool as error:
            raise KilledError(
                "A process that tokenizes was killed, perhaps for want of memory; run the command again to go on, with "
                "fewer data.num_workers."
            ) from error


_tokenizer: AnyTokenizer


def _start_worker(model: bytes, parent: int) -> None:
    """Runs once in each process."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the reader decides
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    _tokenizer = tokenizer_of_bytes(model)


def _end_with_parent(parent: int) -> None:
    """An executor's process would wait for work for ever if its parent was killed."""
    process = multiprocessing.parent_process()
    assert process is not None
    if os.getppid() == parent:
        wait([process.sentinel])
    os._exit(1)


def _encode_chunk(contents: Sequence[Content | EncodedRow]) -> list[tuple[EncodedDocument, ...]]:
    return [encode(_tokenizer, content) for content in contents]
