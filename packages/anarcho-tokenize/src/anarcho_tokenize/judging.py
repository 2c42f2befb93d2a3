"""What a row comes to: it is taken, a filter leaves it out, or it cannot be used."""

from collections.abc import Mapping
from typing import NamedTuple

from anarcho_tokenize.config import DataConfig, SourceConfig
from anarcho_tokenize.encoded import EncodedRow
from anarcho_tokenize.filters import Reason, check_texts, filter_row
from anarcho_tokenize.reading import Fault, excerpt_of
from anarcho_tokenize.rows import Content, RowError, content_of, digest_of


class Taken(NamedTuple):
    """A row that is taken, unless it turns out to be a duplicate."""

    content: Content | EncodedRow
    num_bytes: int
    """UTF-8 bytes of its texts."""
    digest: bytes
    """`digest_of` the content, 32 bytes."""


Verdict = Taken | Fault | Reason


class Judged(NamedTuple):
    """In place of a row's value, where it was judged before."""

    verdict: Verdict


def judge(
    config: DataConfig, source: SourceConfig, value: str | Mapping[str, object] | Fault, *, text_field: str | None
) -> Verdict:
    """What a row of one of the configuration's sources comes to, whatever rows there are beside it."""
    if isinstance(value, Fault):
        return value
    try:
        content = _content(config, value, text_field)
    except RowError as error:
        return Fault(str(error), _excerpt(value))
    num_bytes = check_texts(content, limit=config.max_document_bytes)
    if isinstance(num_bytes, Fault):
        return num_bytes
    verdict = filter_row(source, value, content)
    return Taken(content, num_bytes, digest_of(content)) if verdict is None else verdict


def _content(config: DataConfig, value: str | Mapping[str, object], text_field: str | None) -> Content:
    if not isinstance(value, str):
        return content_of(value, kind=config.kind, text_field=text_field)
    if config.kind != "text":
        raise RowError(f"The document is plain text; expected a row of the kind {config.kind}.")
    return value


def _excerpt(value: str | Mapping[str, object]) -> str:
    """The beginning of a row, of which each column is shortened, since it may hold megabytes."""
    if isinstance(value, str):
        return excerpt_of(value)
    return excerpt_of(repr({name: item[:80] if isinstance(item, str | list) else item for name, item in value.items()}))
