"""The few lengths that batches of whole documents are padded to, chosen so that little is padding.

A compiled step is compiled once for each shape, so there may be only a few; where they should lie depends on the documents. Among the
multiples of 8, dynamic programming finds those with the fewest slots in an epoch, the empty rows of partial batches counted, too.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.errors import ShardError

NUM_LENGTHS = 8
_MULTIPLE = 8
_MAX_CANDIDATES = 256
_SHARED_UNITS = 8


def units_per_batch(length: int, *, batch_tokens: int, rows_per_unit: int) -> int:
    """Units in a batch of rows of this length: as many as `batch_tokens` holds, at least one.

    Eight or more are a multiple of eight, fewer a power of two: so 1, 2, 4 and 8 ranks share one batch without further rows.
    """
    units = max(1, batch_tokens // (length * rows_per_unit))
    return units - units % _SHARED_UNITS if units >= _SHARED_UNITS else 1 << (units.bit_length() - 1)


def check_ladder(ladder: Sequence[int], *, length: int) -> list[int]:
    """The lengths in order, with `length` itself as the last."""
    if not all(0 < step <= length for step in ladder):
        raise ShardError(f"The ladder of lengths is {list(ladder)}; expected lengths from 1 to {length}.")
    return sorted({*ladder, length})


def fit_ladder(
    needed: npt.NDArray[np.int64], *, batch_tokens: int, length: int, rows_per_unit: int, num_lengths: int = NUM_LENGTHS
) -> list[int]:
    """At most `num_lengths` lengths for units that need so many slots a row, and `length` itself for others.

    There are as many as save at least a hundredth of the slots each.
    """
    step = _MULTIPLE * -(-length // (_MULTIPLE * _MAX_CANDIDATES))
    candidates, counts = np.unique(np.minimum(-(needed // -step) * step, length), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    units = np.array(
        [units_per_batch(rung, batch_tokens=batch_tokens, rows_per_unit=rows_per_unit) for rung in candidates.tolist()]
    )
    slots = units * rows_per_unit * candidates
    # least[i]: the fewest slots for the units of the first i candidates, with one length more in each round.
    least, choices = np.where(below == 0, 0.0, np.inf), []
    for _ in range(num_lengths):
        extended, choice = least.copy(), np.arange(len(least))
        for last in range(1, len(least)):
            costs = least[:last] - (below[last] - below[:last]) // -units[last - 1] * slots[last - 1]
            first = int(np.argmin(costs))
            if costs[first] < least[last]:
                extended[last], choice[last] = costs[first], first
        if extended[-1] > 0.99 * least[-1]:
            break
        choices.append(choice)
        least = extended
    ladder, place = {length}, len(candidates)
    for choice in reversed(choices):
        if choice[place] < place:
            ladder.add(int(candidates[place - 1]))
            place = int(choice[place])
    return sorted(ladder)
