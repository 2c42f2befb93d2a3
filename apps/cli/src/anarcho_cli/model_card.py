"""The README.md of an exported model, in the form of Hugging Face's model cards: what it is, what it read, how it did.

Notable: it says what the run's own files say, and leaves out what they do not; nothing is guessed, least of all a licence.

Source: Mitchell et al. 2019, arXiv:1810.03993; https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CONFIG, _METRICS = "config.toml", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a card says."""

    name: str
    """Of the model."""
    licence: str | None
    """As the user names it, such as `mit`."""
    start: str | None = None
    """The token that stands before a text."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's shape -> values."""
    data: str | None = None
    """What was read, as the configuration spells it."""
    datasets: tuple[str, ...] = ()
    """Names of those that are on the Hugging Face hub."""
    trained: dict[str, Any] = field(default_factory=dict)
    """What the run's files say of its training."""
    measured: dict[str, Any] = field(default_factory=dict)
    """The last validation: names of figures -> values."""


def read_facts(model: Path, *, source: Path, name: str, licence: str | None) -> Facts:
    """What is known of a model directory; ``source`` is the run, checkpoint or directory that the user named."""
    from anarcho_model.directory import load_config
    from anarcho_tokenize import load_tokenizer

    config, tokenizer = load_config(model), load_tokenizer(model)
    start_token = next((text for text, number in tokenizer.special_tokens.items() if number == tokenizer.eot_id), None)
    shape = {
        "Architecture": "Qwen3" if config.qk_norm else "Llama",
        "Parameters": f"{config.num_parameters:,}",
        "Layers": config.num_layers,
        "Width": config.dim,
        "Heads": f"{config.num_heads} ({config.kv_heads} for keys and values)",
        "Context": f"{config.context_length:,} tokens",
        "Vocabulary": f"{config.vocab_size:,} tokens",
    }
    run = next((path for path in (source, *source.resolve().parents[:2]) if (path / _CONFIG).is_file()), None)
    if run is None:
        return Facts(name=name, licence=licence, start=start_token, model=shape)
    from anarcho_monitor.metrics import number_from_json

    from anarcho_cli.config import load

    settings = load(run / _CONFIG)
    specs = [item.source for item in settings.data.mixture]
    step = _step(model)
    steps = settings.train.steps if step is None else step
    validations = [record for record in _records(run, "validation") if step is None or record["step"] <= step]
    last = validations[-1] if validations else {}
    start = next(iter(_records(run, "start")[-1:]), {})
    figures = {name: number_from_json(last.get(name)) for name in ("loss", "bits_per_byte")}
    measured = {name: value for name, value in figures.items() if value is not None}
    return Facts(
        name=name,
        licence=licence,
        start=start_token,
        model=shape,
        data=", ".join(specs),
        datasets=tuple(spec.removeprefix("hf://").partition(":")[0] for spec in specs if spec.startswith("hf://")),
        trained={
            "Steps": steps,
            "Tokens": f"{settings.train.batch_tokens * steps:,}",
            "Tokens in a sequence": settings.sequence_length,
            **{name.capitalize(): start[name] for name in ("device", "precision") if name in start},
        },
        measured=measured,
    )


def _step(model: Path) -> int | None:
    """The step of a checkpoint, from the name of its directory."""
    number = model.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    from anarcho_monitor.metrics import read_metrics, surviving_records

    file = run / _METRICS
    records = surviving_records(read_metrics(file)) if file.is_file() else []
    return [record for record in records if record["kind"] == kind]


def model_card(facts: Facts) -> str:
    """The text of README.md."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.licence is not None:
        head["license"] = facts.licence
    if facts.datasets:
        head["datasets"] = list(facts.datasets)
    # JSON is YAML, and needs no library to be written.
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]
    lines += [f"# {facts.name}", "", "A language model that was trained or taken over with AnarchoBot.", ""]
    lines += _table("Model", facts.model)
    if facts.start is not None:
        lines += [
            "## Use",
            "",
            "In training a text stands behind the end of the one before. So put that before a prompt that is no chat:",
            "",
        ]
        lines += ["```python", f'tokenizer("{facts.start}" + prompt, return_tensors="pt")', "```", ""]
    if facts.data is not None:
        lines += ["## Data", "", facts.data, ""]
    lines += _table("Training", facts.trained)
    figures = {key.replace("_", " ").capitalize(): f"{value:.4f}" for key, value in facts.measured.items()}
    lines += _table("Evaluation on held-out data", figures)
    licence = facts.licence or "Not stated."
    return "\n".join([*lines, "## Licence", "", licence, ""])


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    if not rows:
        return []
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
