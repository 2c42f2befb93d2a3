"""Several processes that train one model together, each with the whole model and a share of every step's samples.

Notable: this is all that is known of them outside a framework, so it is the same over MLX, over PyTorch and alone. Whatever could differ
between ranks (a signal, data that is not there yet, memory that runs out) is told to all with `Ranks.gathered` and decided by each from
the same numbers.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

BEAT_SECONDS = 1.0
"""How often ranks that wait for the first hear from it."""

DONE, BUSY, FAILED = 0.0, 1.0, 2.0
"""How far a rank is with something that it does beside the training."""

_WORKING, _DONE, _FAILED = 0.0, 1.0, 2.0
_STATES = ("ready", "waiting", "ended", "failed")


class RankLost(ConnectionError):
    """Another process of the run has ended or cannot be reached any more."""

    torn: bool = False
    """Whether this one holds no state that could be saved: it was lost with the other, or within an update."""
    no_memory: bool = False
    """Whether it is this one that leaves, because its memory ran out where the others cannot be told."""


class RanksDiffer(ValueError):
    """The processes of a run cannot train together; every one of them raises it, with the same sentence."""


class RankFailed(ValueError):
    """Another process of the run ends it, and says itself why."""


def known_to_all(error: BaseException) -> bool:
    """Whether every rank has come to the same place with this error, so that they may leave together."""
    return isinstance(error, RanksDiffer | RankFailed) or getattr(error, "_known_to_all", False)


def mark_known(error: BaseException) -> None:
    """Notes that the other ranks have been told of an error that only this one has."""
    error._known_to_all = True  # type: ignore[attr-defined]


class Ranks(Protocol):
    """The processes of a run, numbered from 0; every method is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process; rank 0 alone writes."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def waited_seconds(self) -> float:
        """How long this rank has waited for others since it began, as far as it knows."""
        ...

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        """Each rank's values, float64 (ranks, values), exact to the last bit and the same everywhere; raises `RankLost`."""
        ...


class Alone:
    """The one process of most runs."""

    rank = 0
    size = 1
    waited_seconds = 0.0

    def gathered(self, values: Sequence[float]) -> np.ndarray:
        """Its own values, float64 (1, values)."""
        return np.array([values], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What all ranks know before a step."""

    stop: int | None
    """Number of a signal that some rank has received."""
    state: str
    """`ready` where all have their samples; `waiting` where one has not, `ended` or `failed` where one never will have."""
    tokens: int
    """Tokens of the step, over all ranks."""
    saving: float = DONE
    """`DONE`, `BUSY` or `FAILED`: how far all ranks are with the checkpoint that they write."""
    seconds: tuple[tuple[float, float], ...] = field(default=(), compare=False)
    """Of each rank's last step, and of waiting for its data."""

    @classmethod
    def agreed(
        cls,
        ranks: Ranks,
        *,
        stop: int | None,
        state: str,
        tokens: int,
        saving: float = DONE,
        seconds: tuple[float, float] = (0.0, 0.0),
    ) -> Turn:
        """Made of what each rank says, in one exchange."""
        told = ranks.gathered([stop or 0, _STATES.index(state), tokens, saving, *seconds])
        number, state_number = (int(value) for value in told[:, :2].max(axis=0))
        return cls(
            stop=number or None,
            state=_STATES[state_number],
            tokens=int(told[:, 2].sum()),
            saving=agreed_state(told[:, 3]),
            seconds=tuple((float(step), float(data)) for step, data in told[:, 4:]),
        )


def agreed_state(told: np.ndarray) -> float:
    """What all ranks' states come to: `BUSY` until none is, then whether one has `FAILED`."""
    return BUSY if (told == BUSY).any() else float(told.max())


def share(samples: int, ranks: Ranks) -> int:
    """How many of a step's samples each rank takes; raises ValueError where they cannot be shared evenly."""
    if samples % ranks.size:
        fits = [size for size in range(1, samples + 1) if samples % size == 0]
        nearest = min(fits, key=lambda size: abs(size - ranks.size))
        raise RanksDiffer(
            f"a step has {samples} samples, which {ranks.size} processes cannot share evenly; start {nearest} of them, or change "
            "train.batch_tokens in a new run"
        )
    return samples // ranks.size


def require_equal(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Raises `RanksDiffer` where the ranks do not say the same of themselves; ``facts`` is {what it is called: its value}."""
    names = ranks.gathered([_digest("\n".join(facts))])[:, 0]
    if (names != names[0]).any():
        raise RanksDiffer("the processes of this run are of different versions; install the same one on all machines")
    values = ranks.gathered([_digest(value) for value in facts.values()])
    differing = values != values[0]
    if not differing.any():
        return
    others = ", ".join(str(rank) for rank in np.flatnonzero(differing.any(axis=1)))
    what = ", ".join(name for name, differs in zip(facts, differing.any(axis=0), strict=True) if differs)
    raise RanksDiffer(
        f"the processes of this run do not agree on: {what} (rank 0 has another value than rank {others}); start all of them with the same "
        "command line and the same versions, on one shared run directory"
    )


def told(ranks: Ranks, text: str) -> str:
    """The text that rank 0 gives, on every rank."""
    if ranks.size == 1:
        return text
    own = text.encode()
    length = int(ranks.gathered([len(own)])[0, 0])
    padded = (own if ranks.rank == 0 else b"").ljust(length + 1)
    return bytes(ranks.gathered(list(padded))[0].astype(np.uint8))[:length].decode()


def texts(ranks: Ranks, own: str) -> list[str]:
    """The text that each rank gives, by its number, on every rank."""
    data = own.encode()
    lengths = ranks.gathered([len(data)])[:, 0].astype(int)
    found = ranks.gathered(list(data.ljust(int(lengths.max()) + 1))).astype(np.uint8)
    return [bytes(row[:length]).decode() for row, length in zip(found, lengths, strict=True)]


@contextmanager
def after_first(ranks: Ranks, *, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Lets rank 0 do the work of the block while the others wait before theirs, however long that takes.

    Rank 0 is heard of all the while, so each notices the loss of the other. Where rank 0's block fails, the others raise `RankFailed`.
    """
    if ranks.size == 1:
        yield
    elif ranks.rank:
        while (state := ranks.gathered([_WORKING])[0, 0]) == _WORKING:
            time.sleep(0.95 * beat_seconds)  # A little less than until the next beat: exchanges are waited for busily.
        if state == _FAILED:
            raise RankFailed("the first process of this run has ended it; its own message says why")
        yield
    else:
        beat = _Beat(lambda: ranks.gathered([_WORKING]), seconds=beat_seconds)
        try:
            yield
        except BaseException as error:
            if beat.stopped() is None:
                with suppress(RankLost):
                    ranks.gathered([_FAILED])
                    mark_known(error)
            raise
        if error := beat.stopped():
            raise error
        ranks.gathered([_DONE])


class _Beat:
    """Calls a function again and again, in a thread of its own, until `stopped`."""

    def __init__(self, function: Callable[[], object], *, seconds: float) -> None:
        self._function, self._seconds = function, seconds
        self._end = threading.Event()
        self._error: RankLost | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stopped(self) -> RankLost | None:
        """Ends the calls, and returns what they have failed with."""
        self._end.set()
        self._thread.join()
        return self._error

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            try:
                self._function()
            except RankLost as error:
                self._error = error
                return


def _digest(text: str) -> float:
    """48 bits of a hash, which a float holds exactly."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))
