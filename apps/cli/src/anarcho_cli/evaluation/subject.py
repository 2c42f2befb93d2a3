"""A model that is judged, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarcho_cli.evaluation.scoring import Scorer
from anarcho_cli.inference import inference_of

if TYPE_CHECKING:
    from anarcho_tokenize import AnyTokenizer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What answers requests."""

    model: Any
    tokenizer: AnyTokenizer
    scorer: Scorer
    backend: str = "torch"
    """The framework that the model belongs to."""

    @classmethod
    def load(cls, directory: Path, *, device: str, backend: str = "torch", batch_tokens: int = 8192) -> Subject:
        """The model of a Hugging Face directory that holds its tokenizer, in float32; loads the framework."""
        from anarcho_tokenize import load_tokenizer

        tokenizer = load_tokenizer(directory)
        model = inference_of(backend).load_model(directory, device=device)
        scorer = Scorer(model, backend=backend, batch_tokens=batch_tokens)
        return cls(model=model, tokenizer=tokenizer, scorer=scorer, backend=backend)
