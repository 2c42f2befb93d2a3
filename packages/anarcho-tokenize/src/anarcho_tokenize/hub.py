"""Sources on the network: data sets of the Hugging Face Hub, and files behind https.

`hf://name?config=..&split=..&field=..&revision=..&files=..` is resolved by the `datasets` library, which knows configurations, splits and
file patterns; the rows of the files are then read by the same readers as local ones. A line that is broken thus costs that line, where the
library's builders give up the whole file, and the place to go on from is exact. The revision is pinned to a commit, also when
reading goes on later. Nothing but the data set's card is stored on this machine.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BufferedReader, BytesIO
from itertools import islice
from logging import CRITICAL
from typing import Any
from urllib.parse import unquote, urlsplit

from anarcho_tokenize.errors import SourceError
from anarcho_tokenize.feeds import Catalog
from anarcho_tokenize.files import DataFile, form_of, require_modules
from anarcho_tokenize.transport import RemoteFile, Retries, offline_error, refusal
from anarcho_tokenize.unpacking import DamagedError, unpack

_BUFFER_BYTES = 2**18
_BLOCK_ROWS = 256
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_KEYS = ("config", "split", "field", "revision", "files")
_JSON_ENDING = re.compile(r"\.(?:json|ndjson)(\.\w+)?$", re.IGNORECASE)
_HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """What an `hf://` source names."""

    name: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    """Paths or patterns of files in the data set, in place of those of a configuration."""

    @classmethod
    def parse(cls, spec: str) -> "HubName":
        """Raises SourceError for a name that is not well formed."""
        body, _, query = spec.removeprefix("hf://").removeprefix("datasets/").partition("?")
        name = body.strip("/")
        if not _NAME.fullmatch(name):
            raise SourceError(
                f"{spec} names no data set; expected hf://name or hf://owner/name, with ?config=.. where wanted."
            )
        values: dict[str, Any] = {}
        for part in filter(None, query.split("&")):
            key, _, value = (unquote(text) for text in part.partition("="))
            if key not in _KEYS or not value:
                raise SourceError(f"{spec} has {part!r}; expected a value for one of {', '.join(_KEYS)}.")
            values[key] = (*values.get(key, ()), *value.split(",")) if key == "files" else value
        return cls(name=name, **values)


def check_remote(spec: str) -> None:
    """Look at a remote source without the network. Raises SourceError for what is not well formed, and for missing modules."""
    if find_spec("datasets") is None:
        raise SourceError(f"{spec} needs datasets to be read; install anarcho-tokenize[datasets].")
    if spec.startswith("hf://"):
        HubName.parse(spec)
    else:
        require_modules(_web_file(spec, retries=0))


def remote_catalog(
    spec: str,
    *,
    revision: str | None,
    retries: int,
    on_retry: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] | None = None,
) -> Catalog:
    """The files of a remote source, of the commit `revision` where it is given. Raises SourceError or NetworkError."""
    check_remote(spec)
    network = {"retries": retries, "on_retry": on_retry, "sleep": sleep}
    if not spec.startswith("hf://"):
        return Catalog([_sized(_web_file(spec, **network))])
    hub = HubName.parse(spec)
    commit, builder = _resolve(hub, revision=revision, network=network)
    urls = [str(url) for url in builder.config.data_files[hub.split]]
    try:
        files = [_hub_file(url, **network) for url in urls]
    except SourceError:
        files = None
    if files is None or _is_array(files[0], urls[0]):
        files = _library_files(hub, builder, network)
    return Catalog(files, revision=commit, text_field=hub.field)


def _web_file(url: str, **network: Any) -> DataFile:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    name = f"{parts.scheme}://{host}{parts.path}"  # without what may be a password
    form, compression = form_of(unquote(parts.path), name=name)
    return DataFile(name, form, compression, None, lambda: _open(url, name=name, network=network))


def _sized(file: DataFile) -> DataFile:
    """The same, after a look at its size."""
    with file.open() as stream:
        remote = stream.raw  # type: ignore[attr-defined] - what is opened here is buffered
        remote.connect()
        return DataFile(file.name, file.form, file.compression, remote.size, file.open)


def _hub_file(url: str, **network: Any) -> DataFile:
    found = _HUB_FILE.fullmatch(url)
    if found is None:
        return _sized(_web_file(url, **network))
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    name, path = f"hf://{found['name']}/{found['path']}", found["path"]
    # JSON lines are often called .json on the hub.
    form, compression = form_of(_JSON_ENDING.sub(r".jsonl\1", path), name=name)
    address = hf_hub_url(found["name"], path, repo_type="dataset", revision=unquote(found["revision"]))
    headers = build_hf_headers(library_name="anarcho-tokenize")
    return DataFile(
        name,
        form,
        compression,
        None,
        lambda: _open(address, name=name, network=network, headers=headers, is_pinned=True),
    )


def _open(url: str, *, name: str, network: dict[str, Any], **options: Any) -> BufferedReader:
    return BufferedReader(RemoteFile(url, name=name, retries=Retries(name, **network), **options), _BUFFER_BYTES)


def _is_array(file: DataFile, url: str) -> bool:
    """Whether a .json file is one array rather than a line for each row."""
    if not _JSON_ENDING.search(url):
        return False
    with file.open() as stream:
        start = unpack(stream, file.compression, name=file.name).read(64)
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _library_files(hub: HubName, builder: Any, network: dict[str, Any]) -> list[DataFile]:
    """Files of other kinds, such as .csv and .arrow: the library reads the rows, and broken content costs the rest of a file."""
    with _quiet():
        rows = builder.as_streaming_dataset(split=hub.split)
    names = [f"hf://{hub.name}, shard {number}" for number in range(rows.num_shards)]
    return [
        DataFile(name, "rows", "", None, BytesIO, partial(_library_rows, rows, number, name, network))
        for number, name in enumerate(names)
    ]


def _library_rows(
    rows: Any, shard: int, name: str, network: dict[str, Any], start: int
) -> Iterator[Mapping[str, object]]:
    retries = Retries(name, **network)
    while True:
        found = iter(rows.shard(num_shards=rows.num_shards, index=shard).skip(start))
        error = None
        while error is None:
            block, error = _next_block(found)
            if block:
                retries.succeeded()
            start += len(block)
            yield from block
            if error is None and len(block) < _BLOCK_ROWS:
                return
        if (problem := _transient(error)) is None:
            raise DamagedError(" ".join(str(error).split())) from error
        retries.wait(problem, cause=error)


def _next_block(rows: Iterator[Any]) -> tuple[list[Any], Exception | None]:
    """Some rows, and the error that came after them; the library is silent meanwhile."""
    block: list[Any] = []
    with _quiet():
        try:
            block.extend(islice(rows, _BLOCK_ROWS))
        except Exception as error:
            return block, error
    return block, None


def _resolve(hub: HubName, *, revision: str | None, network: dict[str, Any]) -> tuple[str, Any]:
    """The commit, and the library's builder, which has the split."""
    source = f"hf://{hub.name}"
    retries = Retries(source, **network)
    while True:
        try:
            with _quiet():
                commit = _commit(hub, revision or hub.revision)
                return commit, _builder(hub, commit)
        except SourceError:
            raise
        except Exception as error:
            if (problem := _transient(error)) is None:
                raise _refused(source, error) from error
            retries.wait(problem, cause=error)


def _commit(hub: HubName, revision: str | None) -> str:
    from huggingface_hub import HfApi

    info = HfApi(library_name="anarcho-tokenize").dataset_info(hub.name, revision=revision, timeout=60)
    if info.sha is None:
        raise SourceError(f"hf://{hub.name} has no commit; expected a data set with files.")
    return info.sha


def _builder(hub: HubName, commit: str) -> Any:
    from datasets import load_dataset_builder

    # The prefix keeps a folder of this name on this machine from being taken for the data set.
    name = f"hf://datasets/{hub.name}"
    files = {hub.split: list(hub.files)} if hub.files else None
    builder = load_dataset_builder(name, hub.config, revision=commit, data_files=files)
    found: dict[Any, list[str]] = dict(builder.config.data_files or {})
    if hub.split not in found:
        splits = ", ".join(sorted(map(str, found))) or "none"
        raise SourceError(f"hf://{hub.name} has no split {hub.split!r}; expected split= one of {splits}.")
    return builder


def _transient(error: BaseException) -> str | None:
    """What failed, where another attempt may succeed; None otherwise."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    chain = list(_causes(error))
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return None
    for one in chain:
        if isinstance(one, HfHubHTTPError):
            status = one.response.status_code
            return f"the server answers {status}" if status >= 500 or status in (408, 425, 429) else None
        if isinstance(one, httpx.RequestError | ConnectionError | TimeoutError):
            return f"{type(one).__name__} ({one})"
    is_unread = any(isinstance(one, LocalEntryNotFoundError) for one in chain)
    return "its card could not be read" if is_unread else None


def _refused(source: str, error: BaseException) -> SourceError:
    """The sentence for an error that another attempt would not change."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    for one in _causes(error):
        if isinstance(one, OfflineModeIsEnabled):
            return offline_error(source)
        if isinstance(one, RevisionNotFoundError):
            return SourceError(f"{source} has no such revision; expected revision= a branch, a tag or a commit of it.")
        if isinstance(one, HfHubHTTPError) and not isinstance(one, EntryNotFoundError):
            return refusal(source, one.response.status_code)
    text = " ".join(str(error).split()).rstrip(".")
    return SourceError(f"{source} cannot be resolved ({text}); check config=, split= and files=.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from writing to standard error; they are as before after it."""
    import datasets
    import huggingface_hub.utils as hub_utils

    loggers = (datasets.logging, hub_utils.logging)
    levels = [logging.get_verbosity() for logging in loggers]
    had_bars = datasets.are_progress_bars_disabled(), hub_utils.are_progress_bars_disabled()
    try:
        for logging in loggers:
            logging.set_verbosity(CRITICAL)
        datasets.disable_progress_bars()
        hub_utils.disable_progress_bars()
        yield
    finally:
        for logging, level in zip(loggers, levels, strict=True):
            logging.set_verbosity(level)
        if not had_bars[0]:
            datasets.enable_progress_bars()
        if not had_bars[1]:
            hub_utils.enable_progress_bars()
