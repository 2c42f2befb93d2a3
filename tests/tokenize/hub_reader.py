"""Reads sources in a process of its own, whose HF_ENDPOINT is a server of the tests: huggingface_hub takes it from the environment once.

A line of standard input is a request {"config": .., "position": .., "take": ..}, a line of standard output its answer; pauses are noted,
not waited for. Whatever else is written to standard error is a library's, and has no place there.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

from anarcho_tokenize import DataConfig
from anarcho_tokenize.config import SourceConfig
from anarcho_tokenize.sources import Examples


def read(request: dict[str, Any]) -> dict[str, Any]:
    """The items up to `take`, and the position after each; or up to an error."""
    options = dict(request["config"])
    options["sources"] = tuple(SourceConfig(**source) for source in options.get("sources", ()))
    notes: list[str] = []
    pauses: list[float] = []
    items: list[Any] = []
    positions: list[Any] = []
    error = None
    examples = Examples(
        DataConfig(**options), position=request.get("position"), on_retry=notes.append, sleep=pauses.append
    )
    try:
        for item in examples:
            values = {key: value for key, value in asdict(item).items() if not isinstance(value, bytes)}
            items.append({"type": type(item).__name__, **values})
            positions.append(examples.position)
            if len(items) == request.get("take"):
                break
    except ValueError as problem:
        error = [type(problem).__name__, str(problem)]
    return {
        "items": items,
        "positions": positions,
        "position": examples.position,
        "progress": examples.progress,
        "notes": notes,
        "pauses": pauses,
        "error": error,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(read(json.loads(line))), flush=True)
