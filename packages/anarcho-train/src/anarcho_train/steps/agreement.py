"""Memory that runs out in one of several processes, told to all of them by the same exchange, whatever the framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anarcho_train.out_of_memory import OutOfMemory, is_out_of_memory, reason
from anarcho_train.ranks import RankLost, Ranks


@contextmanager
def agreed_memory(ranks: Ranks) -> Iterator[None]:
    """Raises `OutOfMemory` in all ranks where memory ran out in one of them: the others would wait for its part for ever."""
    if ranks.size == 1:
        yield
        return
    what = None
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = reason(error)
    try:
        anywhere = ranks.gathered([what is not None]).any()
    except RankLost:
        if what is None:
            raise
        anywhere = True
    if anywhere:
        raise OutOfMemory(what or "another process of the run")
