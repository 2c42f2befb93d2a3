"""Which matrices of a step are orthogonalised together: batches of one shape and one iteration, of capped memory.

Notable: a matrix and the transpose of another are in different batches, because turning one costs more than the larger batch gains; a
parameter may lie in several batches, when it is a stack of more matrices than fit or is split into blocks of different shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from anarcho_optim.coefficients import Variant, iteration
from anarcho_optim.groups import Blocks


class Run(NamedTuple):
    """Consecutive matrices of one block of one parameter."""

    parameter: int
    block: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What matrices must have in common to be orthogonalised in one batch."""

    shape: tuple[int, int]
    """(rows, columns)."""
    variant: Variant
    ns_dtype: str
    frobenius: bool


def _iteration(shape: tuple[int, int], options: Mapping[str, Any]) -> Iteration:
    steps = iteration(options["variant"], ns_steps=options["ns_steps"], ns_coefficients=options["ns_coefficients"])
    return Iteration(
        shape=shape,
        variant=steps,
        ns_dtype=options["ns_dtype"],
        frobenius=options["frobenius_normalization"],
    )


def _capped(counts: Mapping[tuple[int, int], int], limit: int) -> Iterator[list[Run]]:
    """Cuts stacks, given by parameter and block with their number of matrices, into batches of at most ``limit`` matrices."""
    batch: list[Run] = []
    room = limit
    for (parameter, block), count in counts.items():
        start = 0
        while start < count:
            stop = min(count, start + room)
            batch.append(Run(parameter, block, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def batches(
    cuts: Sequence[Blocks], options: Sequence[Mapping[str, Any]], *, limit_bytes: int
) -> Iterator[tuple[Iteration, list[Run]]]:
    """All matrices of the parameters that ``cuts`` and ``options`` describe, in batches of at most ``limit_bytes`` as float32.

    A larger matrix is a batch by itself; empty matrices are in none.
    """
    members: dict[Iteration, dict[tuple[int, int], int]] = {}
    for parameter, (cut, group) in enumerate(zip(cuts, options, strict=True)):
        for block, (rows, columns) in enumerate(cut.shapes):
            if rows * columns:
                key = _iteration((rows, columns), group)
                members.setdefault(key, {})[parameter, block] = cut.count
    for key, counts in members.items():
        rows, columns = key.shape
        for batch in _capped(counts, max(1, limit_bytes // (4 * rows * columns))):
            yield key, batch
