"""A shuffle that needs no memory: position -> item, for any number of items, computed from a seed.

A Feistel network of eight rounds permutes the numbers of 2k bits, the smallest even width (of at least 6) that holds all items; a number
that is no item is permuted again until it is one ("cycle walking", under four times on average beyond 16 items). So the shuffle of
an epoch is known from integers alone, any position can be asked for first, and nothing has to be saved to resume.

Sources: Luby and Rackoff 1988, https://doi.org/10.1137/0217022; Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9;
the round function is the finaliser of SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195.
"""

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_LEAST_HALF_BITS = 3


class Permutation:
    """A bijection of 0..size-1 that depends on size, seed, epoch and block alone, on every machine alike."""

    def __init__(self, size: int, *, seed: int, epoch: int, block: int | None = None) -> None:
        """`block` tells the parts of an epoch from each other where each is shuffled by itself."""
        assert size >= 1
        self.size = size
        self._half_bits = max(_LEAST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        key = f"{seed} {epoch}" if block is None else f"{seed} {epoch} {block}"
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = np.frombuffer(digest, dtype="<u8", count=_ROUNDS).astype(np.uint64)

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The items at these positions (each 0..size-1); same shape."""
        values = np.asarray(positions, dtype=np.int64).astype(np.uint64)
        if self.size == 1:  # the walk of the smallest network to its only item would be the longest
            return np.zeros(values.shape, dtype=np.int64)
        items = self._permute(values)
        while (outside := items >= self.size).any():
            items = np.where(outside, self._permute(items), items)
        return items.astype(np.int64)

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64(2**self._half_bits - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right, key) & mask)
        return (left << bits) | right


def _mixed(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        values = values + key
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
