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
    if case.kind is Kind.optimizer:
        from anarcho_cli.benching.updating import measure_optimizer

        return measure_optimizer(case)
    if case.kind is Kind.data:
        from anarcho_cli.benching.feeding import measure_data

        return measure_data(case)
    if case.kind is Kind.start_up:
        from anarcho_cli.benching.starting import measure_start_up

        return measure_start_up(case)
    from anarcho_cli.benching.training import measure_training

    return measure_training(case)
