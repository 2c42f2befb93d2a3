"""A configuration that changes between the attempts at a run: judged key by key against the one that its checkpoint was made with.

Notable: a key is safe (it changes no weight, but for rounding), needs ``--allow-changes`` (it changes what is learned from here on), or
is forbidden (what was trained and the order of the data would not fit together any more). A key that is not in the table is forbidden,
so a new one has to be thought about. What was allowed once is remembered, or a run that is killed before its next checkpoint would have
to be allowed the same again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from anarcho_train import CheckpointError, CheckpointStore
from anarcho_train.durable import sync

from anarcho_cli import config as configuration
from anarcho_cli.config import SECTIONS, RunConfig, section_values, to_dict
from anarcho_cli.run_directory import CONFIG_FILE
from anarcho_cli.schema import NONE

ACCEPTED_FILE = "accepted_config.json"
"""In the run: which config.toml was allowed, over which one of its checkpoints."""


class ConfigChangedError(ValueError):
    """The configuration is not the one that the run has been trained with."""


class Verdict(StrEnum):
    """What a change of a key means to a run that has begun."""

    safe = "safe"
    flag = "needs --allow-changes"
    forbidden = "forbidden"


_SAFE = {
    "data": ("num_workers", "network_retries", "max_bad_share"),
    "train": (
        "eval_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_last",
        "save_in_background",
        "log_every",
        "micro_batch",
        "cuda_graphs",
        "gradient_checkpointing",
        "update_in_backward",
        "strategy",
        "rank_timeout_seconds",
    ),
    "recovery": ("max_skips", "max_rollbacks", "max_failed_saves", "max_restarts"),
    "monitor": "*",
    "sample": "*",
}
_FLAG = {
    "data": ("damaged_shards",),
    "lora": ("dropout",),
    "optim": "*",
    "preference": "*",
    "recovery": "*",
    "train": (
        "steps",
        "epochs",
        "batch_tokens",
        "length_warmup",
        "first_length",
        "grad_clip",
        "eval_tokens",
        "early_stopping_patience",
        "early_stopping_min_delta",
        "precision",
        "narrow_residual",
        "float8",
        "lean",
        "compile",
        "neftune_alpha",
    ),
}
_FORBIDDEN = {
    "optim": ("normuon", "normuon_axis"),  # They decide what the optimizer's state is.
    "preference": ("loss",),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key that is not what it was."""

    key: str
    """Section and key."""
    old: Any
    """In the checkpoint, as TOML has it."""
    new: Any
    """Now."""
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """The change as JSON values."""
        return {"key": self.key, "old": self.old, "new": self.new, "verdict": self.verdict.value}


def verdict_of(section: str, key: str, config: RunConfig) -> Verdict:
    """What it means that this key changes in a run with this configuration."""
    if key in _FORBIDDEN.get(section, ()):
        return Verdict.forbidden
    if (section, key) == ("train", "micro_batch") and config.data.kind == "preference":
        return Verdict.forbidden  # There it decides which pairs make a sample.
    if (section, key) == ("train", "eval_every") and config.train.early_stopping_patience:
        return Verdict.flag  # The evaluations decide when the run ends.
    for verdict, table in ((Verdict.safe, _SAFE), (Verdict.flag, _FLAG)):
        keys = table.get(section, ())
        if key in keys or (keys == "*" and not (verdict is Verdict.flag and key in _SAFE.get(section, ()))):
            return verdict
    return Verdict.forbidden


def changes_between(saved: Mapping[str, Mapping[str, Any]], config: RunConfig) -> list[Change]:
    """The keys that ``config`` has otherwise than the settings of a checkpoint, which had defaults where they lack a key."""
    found = []
    for section, values in _comparable(to_dict(config)).items():
        before = {**section_values(SECTIONS[section]()), **_comparable(saved).get(section, {})}
        for key, new in values.items():
            if (old := before.get(key, NONE)) != new:
                verdict = verdict_of(section, key, config)
                found.append(Change(key=f"{section}.{key}", old=old, new=new, verdict=verdict))
    return found


def _comparable(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings with a value for the steps of a run that counts epochs."""
    values = {section: dict(keys) for section, keys in settings.items()}
    if values.get("train", {}).get("epochs", NONE) != NONE:
        values["train"]["steps"] = NONE
    return values


def take_changes(
    run_directory: Path,
    config: RunConfig,
    *,
    overridden: bool,
    allow_changes: bool,
    checkpoints: CheckpointStore,
    checkpoint: Path | None,
    notify: Callable[[str], None],
) -> list[Change]:
    """Judges the configuration of a run that is to go on, and makes it the run's own; returns what has changed.

    ``overridden`` says whether it is another than that of the run's file. Raises ConfigChangedError after a table of all that has
    changed, or CheckpointError where the checkpoint is of a version that kept no configuration and the file has changed.
    """
    file = run_directory / CONFIG_FILE
    saved, hashed = _saved_settings(file, checkpoints, checkpoint)
    changes = changes_between(saved, config)
    accepted = not overridden and _accepted(run_directory) == [_sha256(file), hashed]
    refused = [
        change
        for change in changes
        if change.verdict is Verdict.forbidden or (change.verdict is Verdict.flag and not (allow_changes or accepted))
    ]
    if changes and (refused or not accepted):
        name = CONFIG_FILE if checkpoint is None else checkpoint.name
        notify(f"the configuration of {run_directory} is not that of {name}:\n" + "\n".join(table(changes)))
    if refused:
        raise ConfigChangedError(_refusal(refused))
    if changes and not accepted:
        text = configuration.dumps(config) if overridden else file.read_text(encoding="utf-8")
        # First, so that a process that ends in between leaves the old file, which is then judged anew.
        _replace(run_directory / ACCEPTED_FILE, json.dumps([hashlib.sha256(text.encode()).hexdigest(), hashed]))
    if overridden and to_dict(configuration.load(file)) != to_dict(config):
        _replace(file, configuration.dumps(config))
    return changes


def table(changes: Sequence[Change]) -> list[str]:
    """The changes as lines of aligned columns."""
    rows = [("key", "checkpoint", "now", "verdict")]
    rows += [(change.key, _shown(change.old), _shown(change.new), change.verdict.value) for change in changes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]


def announcement(changes: Sequence[Change]) -> dict[str, Any]:
    """The changes as an event of the metrics file."""
    what = ", ".join(f"{change.key} {_shown(change.old)} -> {_shown(change.new)}" for change in changes)
    return {"message": f"the configuration has changed: {what}", "changes": [change.to_dict() for change in changes]}


def _refusal(refused: Sequence[Change]) -> str:
    forbidden = [change for change in refused if change.verdict is Verdict.forbidden]
    if forbidden:
        what = ", ".join(f"{change.key} ({_shown(change.old)} to {_shown(change.new)})" for change in forbidden)
        return f"{what} cannot change in a run that has begun: put it back, or start a new run"
    what = ", ".join(f"{change.key} ({_shown(change.old)} to {_shown(change.new)})" for change in refused)
    return f"{what} changes what the run learns from here on: add --allow-changes if this is meant, or put it back"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _saved_settings(
    file: Path, checkpoints: CheckpointStore, checkpoint: Path | None
) -> tuple[Mapping[str, Mapping[str, Any]], str]:
    """The settings that the run has been trained with, and a hash that names them."""
    if checkpoint is None:
        return to_dict(configuration.load(file)), ""
    hashed = checkpoints.read_hashes(checkpoint).get("config", "")
    settings = checkpoints.read_state(checkpoint).get("settings")
    if settings:
        return settings, hashed
    # A checkpoint of an earlier version: its configuration is known only where the file is still the one that was hashed.
    accepted = _accepted(file.parent)
    if hashed not in (_sha256(file), accepted[1] if accepted else None):
        raise CheckpointError(
            f"{checkpoint} was made with another config than {file} holds now, and by a version that did not keep it; put the run's own "
            "config back, or start a new run"
        )
    return to_dict(configuration.load(file)), hashed


def _accepted(run_directory: Path) -> list[str] | None:
    """The hashes of the file that was allowed, and of the configuration of the checkpoint that it was allowed for."""
    try:
        value = json.loads((run_directory / ACCEPTED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, list) and len(value) == 2 else None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _replace(file: Path, text: str) -> None:
    """The file is the old or the new one at every instant."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)
