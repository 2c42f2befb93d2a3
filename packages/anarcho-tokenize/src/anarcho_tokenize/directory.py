"""A directory of prepared data: the names of its files, and the plan by which it was begun.

train/  validation/      token shards, see `shards`
production.json          plan (what the tokens follow from), position, counts, shards of both parts
quarantine.jsonl         one object for each row that could not be used: place, reason, excerpt
seen.sqlite              hashes of the rows so far, with data.deduplicate
consumed.json            where a reader notes what it does not need any more, see `preparation.release`
shares/                  what the ranks of a shared preparation have done, until it is merged, see `shared_work`
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anarcho_tokenize.chunks import TRAIN, VALIDATION
from anarcho_tokenize.config import DataConfig
from anarcho_tokenize.errors import ShardError
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.shards import VERSION

PARTS = (TRAIN, VALIDATION)
STATE_FILE = "production.json"
QUARANTINE_FILE = "quarantine.jsonl"
SEEN_FILE = "seen.sqlite"
CONSUMED_FILE = "consumed.json"
LOCK_FILE = ".lock"
SHARES = "shares"
SHARES_STAGING = ".shares.partial-"
_STREAMED_VALIDATION_TOKENS = 2**18


def require_own(directory: Path) -> None:
    """Raise ShardError for what is neither new nor empty, nor was begun by a preparation."""
    if not directory.exists() or (directory.is_dir() and (directory / STATE_FILE).is_file()):
        return
    own = (LOCK_FILE, STATE_FILE, QUARANTINE_FILE, SEEN_FILE, CONSUMED_FILE)
    beginnings = tuple(f"{name}{suffix}" for name in own for suffix in (".partial", "-wal", "-shm", "-journal"))
    known = {*own, *beginnings, *PARTS, SHARES}
    if not directory.is_dir() or any(
        entry.name not in known and not entry.name.startswith(SHARES_STAGING) for entry in directory.iterdir()
    ):
        raise ShardError(f"{directory} exists already and holds no prepared data; remove it or choose another one.")


def read_state(directory: Path, *, plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the last commit noted; empty before the first. Raises ShardError for a damaged file, and for another plan than a given one."""
    file = directory / STATE_FILE
    if not file.exists():
        return {}
    try:
        state = json.loads(file.read_bytes())
        version, begun = state["version"], dict(state["plan"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{file} is damaged ({error!r}); remove {directory} and prepare the data anew.") from error
    if version != VERSION:
        raise ShardError(f"{file} has version {version!r}; expected {VERSION}, so prepare the data anew.")
    if plan is not None:
        require_plan(directory, begun, plan)
    return state


def require_plan(directory: Path, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ShardError where a preparation was begun by another plan."""
    if begun != plan:
        keys = ", ".join(key for key in plan if begun.get(key) != plan[key])
        raise ShardError(
            f"{directory} was begun with other values of {keys}; go on with those, or prepare into a new directory."
        )


def plan_of(config: DataConfig, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """What the tokens follow from, as JSON: preparations with equal plans write equal shards."""
    names = ("mixture_end", "kind", "deduplicate", "max_document_bytes", "max_tokens", "validation_fraction")
    values = {name: getattr(config, name) for name in (*names, "shard_tokens")}
    sources = [asdict(source) | {"languages": list(source.languages)} for source in config.mixture]
    bound = {"validation_tokens": validation_bound(config)}
    return {"sources": sources, **values, **bound, "tokenizer_sha256": tokenizer.sha256}


def validation_bound(config: DataConfig) -> int | None:
    """Tokens at which the validation part is full; None where it never is."""
    if config.validation_tokens is None and config.streams:
        return _STREAMED_VALIDATION_TOKENS
    return config.validation_tokens


def consumed_tokens(directory: Path) -> int:
    """Training tokens that the reader does not need any more."""
    file = directory / CONSUMED_FILE
    return int(json.loads(file.read_bytes())["tokens"]) if file.exists() else 0
