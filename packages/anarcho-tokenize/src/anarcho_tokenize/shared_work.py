"""What the ranks of a shared preparation agree on, and how far each is; files are all that they know of each other.

shares/work.json         plan, number of ranks, and the files of the sources as the first rank found them
shares/tokenizer         the tokenizer's bytes
shares/rank-00000/       state.json and segments of one rank, see `shares` and `segments`

The first rank writes work.json and the tokenizer into a folder of its own, which it renames to `shares`: this fails where there is one
already, on network file systems as well, so there is one agreement, and it is whole. The others compare theirs with it.
"""

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from anarcho_tokenize.blocks import Block, ListedFile, divide
from anarcho_tokenize.config import DataConfig, data_config_of
from anarcho_tokenize.directory import SHARES, SHARES_STAGING, require_plan
from anarcho_tokenize.durable import json_document, replace_file
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.feeds import Feed
from anarcho_tokenize.loading import AnyTokenizer, tokenizer_of_bytes
from anarcho_tokenize.sources import is_remote

_WORK_FILE = "work.json"
_TOKENIZER_FILE = "tokenizer"
_STATE_FILE = "state.json"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A file of rows that a rank has brought to disk: where they are from, and what they come to."""

    name: str
    source: int
    file: int
    start: int
    """Of the block."""
    rows: int
    row: int
    """Number of the last row of the block so far."""
    offset: int | None
    """Byte behind it; None where nothing more of the file can be read."""
    is_last: bool
    """Whether it ends the block."""
    num_lines: int
    """Lines of the block so far, where its rows are numbered from its own start."""
    stored_bytes: int
    """Bytes of the file read so far, as stored."""
    block_bytes: int
    """How much of the block's size lies before its end."""
    counts: dict[str, int]
    """Sums over its rows, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """How far a rank is."""

    rank: int
    has_begun: bool = False
    is_done: bool = False
    """Whether it has encoded all that it believes to be needed of its blocks."""
    seconds: float = 0.0
    """Wall time of all its attempts."""
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SharedWork:
    """The agreement, as it is on disk."""

    directory: Path
    """Of the prepared data."""
    plan: dict[str, Any]
    config: DataConfig
    world: int
    files: list[list[ListedFile]]
    """Of each source."""
    identities: list[dict[str, Any]]
    text_fields: list[str | None]
    tokenizer_bytes: bytes

    @property
    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer of all ranks."""
        return tokenizer_of_bytes(self.tokenizer_bytes)

    @cached_property
    def blocks(self) -> list[list[Block]]:
        """Of each source, in order."""
        return divide(self.files, world=self.world)

    def folder(self, rank: int) -> Path:
        """Where a rank writes."""
        return self.directory / SHARES / f"rank-{rank:05d}"

    def state(self, rank: int) -> RankState:
        """How far a rank is. Raises ShardError for a damaged file."""
        file = self.folder(rank) / _STATE_FILE
        try:
            values = json.loads(file.read_bytes())
            segments = tuple(Segment(**segment) for segment in values["segments"])
            return RankState(
                rank=rank, has_begun=True, is_done=values["done"], seconds=values["seconds"], segments=segments
            )
        except FileNotFoundError:
            return RankState(rank=rank, has_begun=file.parent.is_dir())
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardError(
                f"{file} is damaged ({error!r}); remove {file.parent} and run rank {rank} again."
            ) from error

    def write_state(self, state: RankState) -> None:
        """Note how far a rank is."""
        names = [one.name for one in fields(Segment)]  # `asdict` would copy all that does not change
        segments = [{name: getattr(segment, name) for name in names} for segment in state.segments]
        values = {"done": state.is_done, "seconds": state.seconds, "segments": segments}
        replace_file(self.folder(state.rank) / _STATE_FILE, json_document(values))


def read_work(directory: Path) -> SharedWork | None:
    """What was agreed on for a directory; None where no ranks share it. Raises ShardError for damaged files."""
    folder = directory / SHARES
    if not folder.is_dir():
        return None
    file = folder / _WORK_FILE
    try:
        values = json.loads(file.read_bytes())
        if values["version"] != _VERSION:
            raise ShardError(
                f"{file} has version {values['version']!r}; expected {_VERSION}, so prepare the data anew."
            )
        return SharedWork(
            directory=directory,
            plan=values["plan"],
            config=data_config_of(values["config"]),
            world=values["world"],
            files=[[ListedFile(**one) for one in source["files"]] for source in values["sources"]],
            identities=[source["identity"] for source in values["sources"]],
            text_fields=[source["text_field"] for source in values["sources"]],
            tokenizer_bytes=(folder / _TOKENIZER_FILE).read_bytes(),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ShardError):
            raise
        if not folder.is_dir():
            return None  # merged meanwhile
        raise ShardError(f"{file} is damaged ({error!r}); remove {directory} and prepare the data anew.") from error


def agree(
    directory: Path,
    config: DataConfig,
    tokenizer: AnyTokenizer,
    *,
    plan: dict[str, Any],
    world: int,
    feeds: Sequence[Feed],
) -> SharedWork:
    """What the ranks agree on, which is what this one brings where it is the first.

    Opens the feeds, which are of the agreed files then. Raises ShardError where others have begun with other values.
    """
    work = read_work(directory)
    if work is None:
        for feed in feeds:
            feed.open()
        _propose(directory, config, tokenizer, plan=plan, world=world, feeds=feeds)
        work = read_work(directory)
        if work is None:
            raise ShardError(f"{directory} was merged by another process meanwhile; there is nothing left to prepare.")
    require_plan(directory, work.plan, plan)
    if work.world != world:
        raise ShardError(
            f"{directory} was begun by {work.world} ranks, but this one is of {world}; give all of them the same --world, or "
            "prepare into a new directory."
        )
    for feed, identity in zip(feeds, work.identities, strict=True):
        if not feed.is_open or feed.identity != identity:
            feed.identity = identity
            feed.open()
    return work


def remove_shares(directory: Path) -> None:
    """Remove what ranks have written, at once for whoever looks for it."""
    folder = directory / SHARES
    if folder.is_dir():
        folder.rename(directory / f"{SHARES_STAGING}{secrets.token_hex(4)}")
    for remains in directory.glob(f"{SHARES_STAGING}*"):
        shutil.rmtree(remains, ignore_errors=True)


def refuse_shares(directory: Path) -> None:
    """Raise ShardError where ranks share a directory that one process is about to prepare."""
    if (work := read_work(directory)) is not None:
        raise ShardError(
            f"{directory} is shared by {work.world} ranks; run them with --rank and --world {work.world}, and merge then."
        )


def _propose(
    directory: Path,
    config: DataConfig,
    tokenizer: AnyTokenizer,
    *,
    plan: dict[str, Any],
    world: int,
    feeds: Sequence[Feed],
) -> None:
    """Write the agreement, unless another rank is sooner."""
    sources = [
        {"identity": feed.identity, "text_field": feed.text_field, "files": [asdict(one) for one in _listed(feed)]}
        for feed in feeds
    ]
    values = {"version": _VERSION, "world": world, "plan": plan, "config": asdict(config), "sources": sources}
    staging = directory / f"{SHARES_STAGING}{secrets.token_hex(8)}"
    staging.mkdir(parents=True)
    try:
        replace_file(staging / _TOKENIZER_FILE, tokenizer.model_bytes)
        replace_file(staging / _WORK_FILE, json_document(values))
        staging.rename(directory / SHARES)
    except OSError:
        if not (directory / SHARES / _WORK_FILE).is_file():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _listed(feed: Feed) -> list[ListedFile]:
    remote = is_remote(feed.source.source)
    return [ListedFile(one.name, one.form, one.compression, one.size, remote) for one in feed.files]
