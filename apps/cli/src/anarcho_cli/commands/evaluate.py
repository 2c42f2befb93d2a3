"""`anarcho eval`: measure trained models on texts and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anarcho_cli.devices import Device
from anarcho_cli.evaluation.sources import Part, TextSource
from anarcho_cli.models import Which
from anarcho_cli.sampling_options import RunsWith, chosen_place

if TYPE_CHECKING:
    from anarcho_cli.evaluation.report import Evaluation
    from anarcho_cli.evaluation.tasks import Task


def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Runs, checkpoints or model directories.")],
    texts: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="SPEC", help="Predict this text: a file, glob, directory, `hf://name` or `embedded`."
        ),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option("--task", metavar="FILE", help="JSON lines of questions with choices, last words or preferences."),
    ] = None,
    part: Annotated[
        Part,
        typer.Option("--part", help="Documents of texts; auto: all, but of the embedded text the validation part."),
    ] = Part.auto,
    validation_fraction: Annotated[
        float,
        typer.Option("--validation-fraction", min=0, max=1, help="The share that is validation, as in the training."),
    ] = 0.05,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Show so many of a task's first rows as examples.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put tasks as conversations, with the chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Models side by side, with differences to the first.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Most documents of a text and rows of a task.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Tokens that a model reads at a time.")
    ] = 8192,
    checkpoint: Annotated[Which, typer.Option("--checkpoint", help="Which checkpoint of a run.")] = Which.last,
    backend: RunsWith = None,
    device: Annotated[Device, typer.Option("--device", help="Where the models run.")] = Device.auto,
    json: Annotated[bool, typer.Option("--json", help="Print one object with all measures.")] = False,
) -> None:
    """Measure models: bits per byte of texts, accuracy on tasks, each with its standard error.

    Without --text and --task, the validation part of the embedded text is predicted.
    """
    from anarcho_cli.evaluation.report import print_report, to_json
    from anarcho_cli.evaluation.tasks import read_task
    from anarcho_cli.models import find_model
    from anarcho_cli.output import print_json

    _check(models, compare=compare)
    directories = {str(model): find_model(model, which=checkpoint) for model in models}
    specs = texts or ([] if tasks else ["embedded"])
    sources = [TextSource(spec=spec, part=part, validation_fraction=validation_fraction, limit=limit) for spec in specs]
    for source in sources:  # before a model is loaded, or half of the work is done
        source.check()
    read = [read_task(path, shots=shots, limit=limit) for path in tasks or []]

    places = chosen_place(backend, device)
    found = {
        name: _measure(directory, sources, read, places=places, batch_tokens=batch_tokens, chat=chat)
        for name, directory in directories.items()
    }
    if json:
        settings = {**places, "shots": shots, "chat": chat, "limit": limit, "dtype": "float32"}
        print_json(to_json(found, compare=compare, settings=settings))
    else:
        print_report(found, compare=compare)


def _check(models: list[Path], *, compare: bool) -> None:
    from anarcho_cli.evaluation.errors import EvaluationError

    if len(set(models)) < len(models):
        raise EvaluationError("a model is given twice; expected different ones")
    if compare and len(models) < 2:
        raise EvaluationError("--compare was given one model; expected at least two")


def _measure(
    directory: Path,
    sources: list[TextSource],
    tasks: list[Task],
    *,
    places: dict[str, str],
    batch_tokens: int,
    chat: bool,
) -> list[Evaluation]:
    """All texts and tasks with one model, which is let go of at the end."""
    from anarcho_cli.evaluation.answers import evaluate_task
    from anarcho_cli.evaluation.subject import Subject
    from anarcho_cli.evaluation.texts import evaluate_text
    from anarcho_cli.output import note

    subject = Subject.load(directory, **places, batch_tokens=batch_tokens)
    return [
        *(evaluate_text(subject, source, notify=note) for source in sources),
        *(evaluate_task(subject, task, as_chat=chat) for task in tasks),
    ]
