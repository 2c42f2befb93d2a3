"""A cache of keys and values, and the fastest way to read tokens into it: what generation and the engine share.

Notable: prompts are read by the model's own modules; one token a row, and the few that a draft proposes, by a reader
where the model has one (see `anarcho_model.generate.decoding.torch`), on CUDA through graphs. Where rows that go on lie
apart, a step takes the rows between them along as long as they are not more than those that count, for then nothing
has to be copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from anarcho_model.errors import NotFiniteError
from anarcho_model.generate.decoding.torch import Reader, reader_of
from anarcho_model.generate.drawing.torch import choose_tokens, draw_tokens, with_logprobs
from anarcho_model.generate.graphs.torch import FEWEST_POSITIONS, StepGraphs, round_up
from anarcho_model.generate.steps import Drawing, NewToken
from anarcho_model.torch import GPT, KVCache

__all__ = ["Stepper"]


class Stepper:
    """Rows of tokens, each with a length of its own, that a model reads on."""

    def __init__(self, model: GPT, *, rows: int, capacity: int) -> None:
        """Take memory for `rows` x `capacity` tokens: each needs 2 x layers x key/value width elements."""
        self.model = model
        self.cache = KVCache(model, batch=rows, capacity=capacity)
        self.device = self.cache.lengths.device
        self.reader: Reader | None = None
        self.graphs: StepGraphs | None = None

    @classmethod
    def for_text(cls, model: GPT, *, rows: int, capacity: int) -> Stepper:
        """A stepper with at least this capacity; on CUDA it may take over what the last one released, graphs and all."""
        if model.head_weight.device.type == "cuda":
            capacity = min(round_up(capacity, least=FEWEST_POSITIONS), model.config.context_length)
        reader = reader_of(model)
        spare = None if reader is None else reader.spare
        if reader is None or spare is None or (len(spare.cache.lengths), spare.cache.capacity) != (rows, capacity):
            return cls(model, rows=rows, capacity=capacity)
        stepper = cls(model, rows=rows, capacity=1)
        stepper.cache, stepper.reader, stepper.graphs = spare.cache, reader, spare
        reader.spare = None
        return stepper

    def release(self) -> None:
        """Leave the cache and its graphs, where there are any, to the next text; one such cache stays with a model."""
        if self.reader is not None and self.graphs is not None:
            self.reader.spare, self.graphs, self.reader = self.graphs, None, None

    @torch.inference_mode()
    def read(
        self, parts: Sequence[Sequence[int]], *, rows: Sequence[int], lengths: Sequence[int]
    ) -> Float[Tensor, "rows vocab"]:
        """Read these tokens of each row after its first `length`, and return the logits after the last of each.

        Rows may be given tokens of different numbers; the longest must fit after every row's length.
        """
        self._refresh()
        width = max(map(len, parts))
        cache = self.cache.select(rows)
        cache.lengths = torch.tensor(lengths, device=self.device)
        padded = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts], device=self.device)
        hidden = self.model.hidden_states(padded, cache=cache)
        last = torch.tensor([len(part) - 1 for part in parts], device=self.device)
        return _ready(self.model.unembed(hidden[torch.arange(len(parts), device=self.device), last]))

    @torch.inference_mode()
    def step(self, tokens: Sequence[int | None], *, lengths: Sequence[int]) -> Float[Tensor, "going vocab"]:
        """Read one token of each row that is not None, and return the logits after them, without the other rows.

        Rows and lengths are all of the cache's. What lies at and after the length of a row with None may be overwritten;
        such a length is less than the capacity.
        """
        going = [row for row, token in enumerate(tokens) if token is not None]
        if self.reader is None:
            return self.read([[tokens[row] or 0] for row in going], rows=going, lengths=[lengths[row] for row in going])
        first, stop, reach = going[0], going[-1] + 1, max(lengths[row] for row in going) + 1
        if self.graphs is not None:
            count = min(round_up(stop), len(tokens))
            logits = self.graphs.step([token or 0 for token in tokens[:count]], lengths[:count], reach=reach)
            return _ready(logits if len(going) == count else logits[going])
        together = stop - first <= 2 * len(going)
        taken = list(range(first, stop)) if together else going
        positions = [lengths[row] for row in taken]
        logits = self.reader.read(
            torch.tensor([[tokens[row] or 0] for row in taken], device=self.device),
            torch.tensor(positions, device=self.device)[:, None],
            layers=self.cache.layers,
            rows=slice(first, stop) if together else torch.tensor(taken, device=self.device),
            extent=reach,
            alike=len(set(positions)) == 1,
        )
        return _ready(logits if len(taken) == len(going) else logits[[row - first for row in going]])

    @torch.inference_mode()
    def read_all(self, tokens: Sequence[int], *, length: int) -> Float[Tensor, "tokens vocab"]:
        """Read a few tokens of row 0 after its first `length`, and return the logits after each."""
        ids = torch.tensor([tokens], device=self.device)
        if self.reader is None:
            cache = self.cache.select([0])
            cache.lengths = torch.tensor([length], device=self.device)
            return _ready(self.model(ids, cache=cache)[0])
        stop = length + len(tokens)
        positions = torch.arange(length, stop, device=self.device)[None]
        alike = len(tokens) == 1
        return _ready(
            self.reader.read(ids, positions, layers=self.cache.layers, rows=slice(0, 1), extent=stop, alike=alike)
        )

    @torch.inference_mode()
    def draw(
        self, logits: Float[Tensor, "_ vocab"], drawings: Sequence[Drawing], *, rows: Sequence[int] | None = None
    ) -> list[int]:
        """The next token of these rows of the logits, one for each drawing; None takes all rows."""
        logits = logits if rows is None else logits[list(rows)]
        configs, draws = [drawing.config for drawing in drawings], [drawing.draws for drawing in drawings]
        try:
            return draw_tokens(logits, configs=configs, generators=draws)
        except NotFiniteError:
            self.graphs = None  # so that no later text takes over a cache that may hold NaN
            raise

    @torch.inference_mode()
    def draw_with_logprobs(
        self, logits: Float[Tensor, "_ vocab"], drawings: Sequence[Drawing], *, rows: Sequence[int] | None = None
    ) -> list[NewToken]:
        """As `draw`, with log-probabilities; NO_TOKEN for a row whose logits are NaN or infinite, and the others as ever."""
        logits = logits if rows is None else logits[list(rows)]
        configs, draws = [drawing.config for drawing in drawings], [drawing.draws for drawing in drawings]
        tokens = choose_tokens(logits, configs=configs, generators=draws)
        return with_logprobs(tokens, logits, tops=[drawing.top_logprobs for drawing in drawings])

    @torch.inference_mode()
    def forget(self, row: int) -> None:
        """Zero what the cache holds for this row: NaN would reach later texts through places that are masked."""
        for layer in self.cache.layers:
            layer.keys[row].zero_()
            layer.values[row].zero_()

    def _refresh(self) -> None:
        """Look whether the weights have changed; done with every prompt, because it takes too long for every step."""
        reader = reader_of(self.model)
        if reader is self.reader:
            return
        self.reader, self.graphs = reader, None
        if reader is not None and self.device.type == "cuda":
            self.graphs = StepGraphs(reader, self.cache)


def _ready(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """In float32 where tokens are drawn: on CUDA where they are, or else on the CPU, because not every device sorts alike."""
    return logits.float() if logits.device.type == "cuda" else logits.float().cpu()
