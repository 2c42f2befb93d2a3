"""Attention within documents that share a row, in models that are compiled for CUDA: blocks of keys that no query sees are not read.

Notable:

* which blocks a query's block needs is found from the least and the largest document number of each, on the device, in the same few
  operations for any number of documents: nothing is waited for, and nothing is compiled again for other documents;
* of a block that is needed whole no mask is computed; in the others a token sees its own document up to itself.

The kernel is PyTorch's FlexAttention (arXiv:2412.05496), which exists in compiled code alone. Elsewhere a mask of all pairs of tokens
serves, as `anarcho_model.torch` makes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anarcho_model.layers import torch_cuda

__all__ = ["DocumentBlocks", "attend", "document_blocks", "suits"]

BLOCK = 128
"""Tokens of a block; FlexAttention's default, of which its kernels' tiles are parts."""
MIN_HEAD_SIZE = 16
"""What its kernels ask for."""


class DocumentBlocks(NamedTuple):
    """Of each block of queries, which blocks of keys it needs, and the other way round: how many, and their numbers, these first."""

    segments: Int[Tensor, "batch length"]
    partial: Int[Tensor, "batch 1 blocks"]
    partial_numbers: Int[Tensor, "batch 1 blocks blocks"]
    whole: Int[Tensor, "batch 1 blocks"]
    whole_numbers: Int[Tensor, "batch 1 blocks blocks"]
    partial_queries: Int[Tensor, "batch 1 blocks"]
    partial_queries_numbers: Int[Tensor, "batch 1 blocks blocks"]
    whole_queries: Int[Tensor, "batch 1 blocks"]
    whole_queries_numbers: Int[Tensor, "batch 1 blocks blocks"]


def suits(segments: Int[Tensor, "batch length"], *, head_size: int, compiled: bool) -> bool:
    """Whether this is compiled for CUDA, and of a size that the kernel takes."""
    here = torch_cuda.AVAILABLE and segments.device.type == torch_cuda.DEVICE_TYPE
    return here and compiled and head_size >= MIN_HEAD_SIZE


def document_blocks(segments: Int[Tensor, "batch length"]) -> DocumentBlocks:
    """From the number of the document that each token belongs to; a document's tokens need not lie side by side."""
    return DocumentBlocks(segments, *_lists(segments))


@torch.library.custom_op(
    "anarcho_model::document_block_lists",
    mutates_args=(),
    schema="(Tensor segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _lists(segments: Tensor) -> tuple[Tensor, ...]:
    """What `DocumentBlocks` has besides the segments; each tensor is contiguous, the dimension of size 1 included.

    The kernels find a row of the batch by the stride of that dimension, and go through all lists as if they lay side by side. A compiler
    that made the lists itself gives that dimension any stride, for it means nothing to it, so they come from an operator of their own.
    """
    batch, length = segments.shape
    count = -(-length // BLOCK)
    # What is beyond the end belongs to the last document, so that it makes no block larger.
    padded = torch.cat((segments, segments[:, -1:].expand(batch, count * BLOCK - length)), dim=1)
    low, high = padded.view(batch, 1, count, BLOCK).aminmax(dim=-1)
    number = torch.arange(count, device=segments.device)
    earlier, same = number[:, None] > number, number[:, None] == number
    overlap = (low[..., None] <= high[..., None, :]) & (low[..., None, :] <= high[..., None])
    needed = overlap & (earlier | same)
    single = low == high
    whole = needed & earlier & single[..., None] & single[..., None, :]
    partial = needed & ~whole
    return *_listed(partial), *_listed(whole), *_listed(partial.mT), *_listed(whole.mT)


@_lists.register_fake
def _(segments: Tensor) -> tuple[Tensor, ...]:
    batch, length = segments.shape
    count = -(-length // BLOCK)
    counts, numbers = (batch, 1, count), (batch, 1, count, count)
    return tuple(segments.new_empty(shape, dtype=torch.int32) for _ in range(4) for shape in (counts, numbers))


def _listed(
    chosen: Bool[Tensor, "batch 1 rows columns"],
) -> tuple[Int[Tensor, "batch 1 rows"], Int[Tensor, "batch 1 rows columns"]]:
    """How many columns of each row are chosen, and the columns' numbers, the chosen ones first and in order."""
    numbers = chosen.to(torch.int32, memory_format=torch.contiguous_format).argsort(
        dim=-1, descending=True, stable=True
    )
    return chosen.sum(-1, dtype=torch.int32).contiguous(), numbers.to(torch.int32)


def attend(
    q: Float[Tensor, "batch heads length head"],
    k: Float[Tensor, "batch heads length head"],
    v: Float[Tensor, "batch heads length head"],
    blocks: DocumentBlocks,
) -> Float[Tensor, "batch heads length head"]:
    """Softmax attention scaled by 1/sqrt(head) to the keys of a token's own document up to itself; to be compiled."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    segments, length = blocks.segments, q.shape[2]
    mask: Any = BlockMask(
        (length, length),
        *blocks[1:],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda row, _, query, key: (segments[row, query] == segments[row, key]) & (key <= query),
    )
    # Its other kernel, for less than a block of queries, reads beyond the end of a row that its tiles do not divide (PyTorch 2.11).
    result: Any = flex_attention(q, k, v, block_mask=mask, kernel_options={"BACKEND": "TRITON"})
    return result
