"""Steps of one token a row as CUDA graphs: recorded once for each size, then replayed by a single call.

Notable: a step launches hundreds of small kernels, and telling the GPU each one takes longer than computing it. A graph
has fixed shapes, so rows and positions are rounded up to powers of two, which bounds the number of graphs by the product
of two logarithms; they share one pool of memory.

Source: CUDA Graphs as torch exposes them, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anarcho_model.generate.decoding.torch import Reader
from anarcho_model.torch import KVCache

__all__ = ["StepGraphs", "round_up"]

FEWEST_POSITIONS = 256
"""Attending to fewer positions than this is not worth a graph of its own."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Int[Tensor, "2 rows 1"]
    logits: Float[Tensor, "rows vocab"]


class StepGraphs:
    """The graphs of one cache, each made when its size first comes."""

    def __init__(self, reader: Reader, cache: KVCache) -> None:
        self.reader, self.cache = reader, cache
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.device = cache.lengths.device
        self.pool = torch.cuda.graph_pool_handle()
        # One for all graphs, because what one leaves free in the pool serves only those of the same stream; and of their own, because
        # libraries have a workspace for each stream, which here lies in the pool.
        self.stream = torch.cuda.Stream(self.device)

    def step(self, tokens: Sequence[int], positions: Sequence[int], *, reach: int) -> Float[Tensor, "rows vocab"]:
        """Logits after one token of each of the cache's first rows, as many as tokens; valid until the next step.

        `reach` is one more than the furthest position of a row that counts.
        """
        rows = len(tokens)
        extent = min(round_up(reach, least=FEWEST_POSITIONS), self.cache.capacity)
        inputs = torch.tensor([[*tokens], [*positions]]).unsqueeze(-1)
        graph = self.graphs.get((rows, extent))
        if graph is None:
            graph = self.graphs[rows, extent] = self._record(inputs.to(self.device), extent)
        graph.inputs.copy_(inputs.pin_memory(), non_blocking=True)
        graph.graph.replay()
        return graph.logits

    def _record(self, inputs: Int[Tensor, "2 rows 1"], extent: int) -> _Graph:
        def read() -> Tensor:
            rows = slice(0, inputs.shape[1])
            return self.reader.read(*inputs, layers=self.cache.layers, rows=rows, extent=extent, alike=False)

        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            with torch.cuda.stream(side):
                read()  # so that libraries have made their choices
            current.wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                logits = read()
        return _Graph(graph, inputs, logits)


def round_up(count: int, *, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (count - 1).bit_length())
