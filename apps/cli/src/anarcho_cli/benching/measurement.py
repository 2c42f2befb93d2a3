"""One measurement: its kind decides by what; the figures come back as plain numbers."""

from __future__ import annotations

from typing import Any

from anarcho_cli.benching.cases import Case, Kind


def measure(case: Case) -> dict[str, Any]:
    """The figures of a case, measured in this process."""
    if case.kind is Kind.tokenizer:
        from anarcho_cli.benching.tokenizing import measure_tokenizer

        return measure_tokenizer(case)
    if case.kind is Kind.generation:
        from anarcho_cli.benching.generating import measure_generation

        return measure_generation(case)
    from anarcho_cli.benching.training import measure_training

    return measure_training(case)
