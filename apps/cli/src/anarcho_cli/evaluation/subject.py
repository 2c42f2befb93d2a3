"""A model that is judged, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anarcho_cli.evaluation.scoring import Scorer

if TYPE_CHECKING:
    from anarcho_model.torch import GPT
    from anarcho_tokenize import AnyTokenizer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What answers requests."""

    model: GPT
    tokenizer: AnyTokenizer
    scorer: Scorer

    @classmethod
    def load(cls, directory: Path, *, device: str, batch_tokens: int = 8192) -> Subject:
        """The model of a Hugging Face directory that holds its tokenizer, in float32; loads torch."""
        from anarcho_model.weights import load_pretrained
        from anarcho_tokenize import load_tokenizer

        tokenizer = load_tokenizer(directory)
        model = load_pretrained(directory, device=device).eval()
        return cls(model=model, tokenizer=tokenizer, scorer=Scorer(model, batch_tokens=batch_tokens))
