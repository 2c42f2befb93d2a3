"""The values that a pipeline's stages set, looked at before the first of them runs.

Notable: a stage's configuration is not known before the stages that it uses have run, so each section is looked at by itself, and those
that come from another stage are left out.
"""

from __future__ import annotations

from pathlib import Path

from anarcho_cli.config import SECTIONS, check_sections
from anarcho_cli.layers import ROOT_KEYS
from anarcho_cli.pipeline.command_line import is_model, toml_text
from anarcho_cli.pipeline.definition import REFERENCE, Pipeline, Stage, texts
from anarcho_cli.pipeline.errors import PipelineError

_OF_A_MODEL = ("model", "tokenizer")
"""Sections that a stage has from the model with which it goes on."""


def check_values(pipeline: Pipeline) -> None:
    """Raises PipelineError for the first value, of all stages, that its key cannot have."""
    for stage in pipeline.stages:
        if stage.command.configured:
            try:
                _check_stage(pipeline, stage)
            except ValueError as error:
                raise PipelineError(f"{pipeline.path}: stage '{stage.name}': {error}") from error


def _check_stage(pipeline: Pipeline, stage: Stage) -> None:
    goes_on = "from" in stage.options or any(is_model(pipeline, base) for base in stage.bases)
    set_here = {key.split(".")[0] for key in stage.settings if key not in ROOT_KEYS}
    names = (set_here & SECTIONS.keys()) - set(_OF_A_MODEL if goes_on else ())
    file = stage.options.get("config")
    if isinstance(file, str) and file.startswith(REFERENCE):
        return  # what is in it is not known yet
    check_sections(
        names,
        preset=stage.options.get("preset", stage.command.preset_with_model if goes_on else stage.command.preset),
        file=None if file is None else Path(str(file)),
        overrides=[
            f"{key}={toml_text(value)}"
            for key, value in stage.settings.items()
            if not any(text.startswith(REFERENCE) for text in texts(value))
        ],
    )
