"""The documents of a text source, or of its validation part.

The validation part is the one that a run keeps from its training with the same share: a document belongs to it by a hash of its text,
wherever it stands. Nothing heavy is imported here, so that a command line can name the options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from anarcho_cli.evaluation.errors import EvaluationError


class Part(StrEnum):
    """Which documents of a source are read."""

    auto = "auto"
    """The validation part of the embedded corpus, all of any other source."""
    validation = "validation"
    all = "all"


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A source of documents to predict."""

    spec: str
    part: Part = Part.auto
    validation_fraction: float = 0.05
    """As data.validation_fraction of the run that kept it from training."""
    limit: int | None = None
    """Read so many documents."""

    @property
    def is_validation(self) -> bool:
        """Whether the validation part alone is read."""
        return self.part is Part.validation or (self.part is Part.auto and self.spec == "embedded")

    @property
    def name(self) -> str:
        """The source, and its part where that is not all."""
        return f"{self.spec} (validation)" if self.is_validation else self.spec

    def check(self) -> None:
        """Look whether the source is there, without the network. Raises FileNotFoundError or SourceError."""
        from anarcho_tokenize import DataConfig, check_source

        check_source(DataConfig(source=self.spec))

    def documents(self, *, notify: Callable[[str], None]) -> Iterator[str]:
        """The texts; `notify` is told of rows that cannot be used, which are left out.

        Raises EvaluationError where there is none, and the errors of `anarcho_tokenize.sources`.
        """
        found = 0
        for text in islice(self._texts(notify), self.limit):
            found += 1
            yield text
        if found == 0:
            hint = " in its validation part; use --part all" if self.is_validation else ""
            raise EvaluationError(f"{self.spec} holds no document{hint}")

    def _texts(self, notify: Callable[[str], None]) -> Iterator[str]:
        from anarcho_tokenize import BadRow, DataConfig, Example, Examples
        from anarcho_tokenize.chunks import is_validation

        config, bad = DataConfig(source=self.spec), 0
        for item in Examples(config, on_retry=notify):
            if isinstance(item, BadRow):
                bad += 1
                if bad == 1:
                    notify(f"rows that cannot be used are left out; the first: {item}")
            elif isinstance(item, Example) and (
                not self.is_validation or is_validation(item.digest, fraction=self.validation_fraction)
            ):
                yield str(item.content)
