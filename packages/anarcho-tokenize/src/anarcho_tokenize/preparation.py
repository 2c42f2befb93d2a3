"""Text into token shards, in one call: `prepare_shards` for the sources of a configuration, `write_shards` for documents at hand."""

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anarcho_tokenize.bpe import check_unicode
from anarcho_tokenize.chunks import RowSource
from anarcho_tokenize.config import DataConfig
from anarcho_tokenize.directory import CONSUMED_FILE, LOCK_FILE, STATE_FILE
from anarcho_tokenize.durable import replace_file, sync_directory
from anarcho_tokenize.encoded import EncodedRow
from anarcho_tokenize.errors import ShardError, SourceError
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.production import PreparationReport, Production
from anarcho_tokenize.rows import digest_of, texts_of
from anarcho_tokenize.shared_work import refuse_shares
from anarcho_tokenize.sources import BadRow, Example, Examples, check_source


def prepare_shards(
    config: DataConfig,
    tokenizer: AnyTokenizer,
    directory: str | os.PathLike[str],
    *,
    on_progress: Callable[[PreparationReport], None] | None = None,
    notify: Callable[[str], None] | None = None,
    budget: int | None = None,
) -> PreparationReport:
    """Write `directory/train` and `directory/validation`, each for `TokenShards.open`, or go on where an attempt was interrupted.

    `on_progress` is called after each chunk of about 1 MiB of text; `notify` is told, in a line, of network failures and what is done
    about them. With a `budget`, in bytes, the oldest training shards that a reader has called `release` for are deleted, and it waits
    while none can be. Scripts that use processes (`config.num_workers`) need `if __name__ == "__main__":`, as multiprocessing does.

    Raises FileNotFoundError or SourceError for a source that cannot be read or has too many bad rows, NetworkError where the network
    stays away, ShardError where the directory holds something else or a part that is wanted would be empty.
    """
    refuse_shares(Path(directory))
    if not Path(directory, STATE_FILE).exists():
        check_source(config)  # a source that is not there leaves no directory behind

    def open_source(position: dict[str, Any] | None, is_duplicate: Callable[[bytes], bool] | None) -> RowSource:
        return Examples(config, position=position, is_duplicate=is_duplicate, on_retry=notify)

    with Production(Path(directory), tokenizer, config, open_source=open_source, budget=budget) as production:
        return production.run(on_progress)


def is_prepared(directory: str | os.PathLike[str]) -> bool:
    """Whether the directory holds what `prepare_shards` writes, finished or not, rather than texts.

    Raises ShardError for what ranks have prepared and nobody has merged yet.
    """
    refuse_shares(Path(directory))
    return Path(directory, STATE_FILE).is_file()


def write_shards(
    documents: Iterable[str],
    tokenizer: AnyTokenizer,
    directory: str | os.PathLike[str],
    *,
    validation_fraction: float = 0.05,
    shard_tokens: int = DataConfig.shard_tokens,
    source: str = "documents",
) -> PreparationReport:
    """Write shards of documents that a program has at hand, whole or not at all; the directory must be new or empty.

    `source` is a note of where they are from. Documents without text are left out. Encodes in this process.
    Raises ShardError where the directory is in use, or a part that is wanted would hold no document.
    """
    target = Path(directory)
    _require_empty(target)
    config = DataConfig(
        source=source,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        streaming=False,
        num_workers=0,
    )
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    _remove_remains(target)
    try:
        with Production(staging, tokenizer, config, open_source=lambda *_: _GivenDocuments(documents)) as production:
            report = production.run()
        (staging / LOCK_FILE).unlink(missing_ok=True)
        _require_empty(target)
        staging.replace(target)
        sync_directory(target.parent)
        return report
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_texts(config: DataConfig, *, notify: Callable[[str], None] | None = None) -> Iterator[str]:
    """The texts of a configuration's rows, for `train_tokenizer`; `notify` is told of rows that cannot be used, which are passed over.

    Raises SourceError where no row can be used.
    """
    num_texts, bad = 0, []
    for item in Examples(config, on_retry=notify):
        if isinstance(item, Example):
            num_texts += 1
            assert not isinstance(item.content, EncodedRow), "nothing was recorded"
            yield from texts_of(item.content)
        elif isinstance(item, BadRow):
            bad = bad or [item]
    if bad and not num_texts:
        raise SourceError(str(bad[0]))
    if bad and notify is not None:
        notify(f"some rows cannot be used and are passed over; the first: {bad[0]}")


def release(directory: str | os.PathLike[str], tokens: int) -> None:
    """Tell a producer that the first so many training tokens are not needed any more, so that it may delete their shards."""
    replace_file(Path(directory) / CONSUMED_FILE, json.dumps({"tokens": tokens}).encode())


def _require_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ShardError(f"{target} already exists and is not an empty directory; remove it or choose another one.")


def _remove_remains(target: Path) -> None:
    """What killed attempts left beside `target`; an attempt that is still alive holds its lock."""
    for remains in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        with suppress(Timeout), FileLock(remains / LOCK_FILE).acquire(timeout=0):
            shutil.rmtree(remains, ignore_errors=True)


class _GivenDocuments:
    """Documents of a program as a source, which has no position to go on from."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.position: dict[str, Any] = {}
        self.progress: tuple[int, int | None] = (0, None)

    def __iter__(self) -> Iterator[Example]:
        for number, text in enumerate(self._documents, start=1):
            if text:
                check_unicode(text, name=f"Document {number}")
                yield Example(
                    content=text,
                    num_bytes=len(text.encode()),
                    digest=digest_of(text),
                    source=0,
                    repeated=False,
                    place=f"document {number}",
                )
