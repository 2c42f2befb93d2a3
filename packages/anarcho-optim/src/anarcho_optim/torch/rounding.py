"""Float32 numbers written into narrower tensors, rounded to the nearest or stochastically.

Notable: added to a bfloat16 number, whatever is smaller than half of its last place is lost for ever when it is rounded to the nearest.
Rounded up with the probability of what is cut off, it is right on average (arXiv:2010.06192), and weights and moments of 16 bits learn.
The random numbers are torch's own, of the tensor's device, so a run whose generators are restored repeats them.
"""

from __future__ import annotations

import torch
from torch import Tensor

CUT_BITS = 16
"""Bits of a float32 number that bfloat16 does not have."""


def copy_rounded_(target: Tensor, source: Tensor, *, stochastic: bool) -> None:
    """``target`` <- ``source`` (float32); ``stochastic`` says how it is rounded to bfloat16, other types take the nearest number."""
    if not stochastic or target.dtype != torch.bfloat16:
        target.copy_(source)
        return
    noise = torch.randint_like(source, 1 << CUT_BITS, dtype=torch.int32)
    # A float's bits count up with its size, so a carry out of the cut bits is the next number away from zero.
    bits = (noise + source.contiguous().view(torch.int32)).bitwise_and_(-1 << CUT_BITS)
    target.copy_(bits.view(torch.float32))
