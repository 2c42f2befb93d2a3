"""Products with a weight that is used again and again, for the few rows of input that generation has.

Notable: a processor spends the time of such a product on streaming the weight through, so its layout decides. Measured
for layers of SmolLM2-135M on a Xeon with torch 2.15: a single float32 row is 1.2 to 1.8 times as fast from the
transposed weight where there are more outputs than inputs (with fewer, 0.7 times), and eight rows are 1.5 times as fast
from oneDNN's blocks (bfloat16: 1.4; a single row there 0.8 to 1.0). Layouts are copies, made when the first input of
that kind comes, in large pages (see `large_pages`); elsewhere, and for many rows, the weight itself is used.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from anarcho_model.generate.linear.large_pages import LargePages

__all__ = ["FewRowsLinear"]

BLOCKED_ROWS = 32
"""With more rows than this, blocks gain next to nothing."""
_HAS_BLOCKS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


class FewRowsLinear:
    """One product for the weights of several linear layers that read the same input; their outputs follow each other."""

    def __init__(self, weights: Sequence[Float[Tensor, "_ inputs"]], *, dtype: torch.dtype, pages: LargePages) -> None:
        self.pages = pages
        self.weights = [weight.detach() for weight in weights]
        self.dtype = dtype
        self.transposed: Tensor | None = None
        """For a single row."""
        self.blocked: Tensor | None = None
        """For a few rows, in a layout of oneDNN's own."""
        self.joined: Tensor | None = None
        """For everything else."""
        on_processor = self.weights[0].device.type == "cpu"
        self.blocks_help = _HAS_BLOCKS and on_processor and dtype in (torch.float32, torch.bfloat16)
        outputs, inputs = sum(len(weight) for weight in weights), weights[0].shape[1]
        self.transpose_helps = self.blocks_help and dtype == torch.float32 and outputs > inputs

    def __call__(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        rows = x.shape[0]
        if rows == 1 and self.transpose_helps:
            if self.transposed is None:
                self.transposed = self.pages.copy(self._join().t())
            return x @ self.transposed
        if 1 < rows <= BLOCKED_ROWS and self.blocks_help:
            if self.blocked is None:
                self.blocked = torch.ops.mkldnn._reorder_linear_weight(self._join(), None)
            return torch.ops.mkldnn._linear_pointwise(x, self.blocked, None, "none", [], "")
        if self.joined is None:
            self.joined = self.pages.copy(self._join()) if self.blocks_help else self._join()
        return F.linear(x, self.joined)

    def _join(self) -> Float[Tensor, "outputs inputs"]:
        """The weights above each other; a single one of the right type is not copied."""
        weights = [weight.to(self.dtype) for weight in self.weights]
        return weights[0] if len(weights) == 1 else torch.cat(weights)
