"""The configuration of a run: one section per package, from defaults, a preset, a TOML file and ``--set``, in that order.

`resolve` merges the layers and checks them; `dumps` writes a configuration as TOML that `load` reads back as an equal
value. Importing this module loads the packages' settings and pydantic, and neither torch nor mlx.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from anarcho_model import InitConfig, LoraConfig, ModelConfig
from anarcho_model.flops import training_flops_per_token
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.lora.config import adapter_shapes
from anarcho_monitor import MonitorConfig
from anarcho_optim import OptimConfig
from anarcho_tokenize import DataConfig, TokenizerConfig
from anarcho_train import PreferenceConfig, RecoveryConfig, TrainConfig, divisors

from anarcho_cli import schema
from anarcho_cli.layers import (
    DEFAULT_PRESET,
    ROOT_KEYS,
    ConfigError,
    Layer,
    file_layer,
    merge,
    parse_layer,
    preset_layer,
    preset_names,
    preset_text,
    set_layer,
    suggestion,
)

__all__ = [
    "ConfigError",
    "Layer",
    "RunConfig",
    "SampleConfig",
    "dumps",
    "json_schema",
    "load",
    "loads",
    "preset_names",
    "preset_text",
    "resolve",
]


PAIR_BATCH_TOKENS = 4096
"""Tokens of a batch of pairs of answers where `train.micro_batch` is `auto`; more of them at once is of use nowhere."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """The sample of text at the end of a run: how it is drawn, and after which prompt."""

    prompt: str = "The"
    """Text that the sample continues; an empty string lets the model begin a document of its own."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a training run, checked as a whole; `preference` is for the data kind of that name alone."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.sequence_length > self.model.context_length:
            raise ConfigError(
                f"train.sequence_length is {self.sequence_length}, longer than model.context_length "
                f"{self.model.context_length}; shorten the sequence or raise the context length"
            )
        self.train.batch_sequences(self.sequence_length)
        if self.train.length_warmup and self.data.kind != "text":
            raise ConfigError(
                f"train.length_warmup is {self.train.length_warmup}, but data.kind is '{self.data.kind}'; expected 0, as conversations "
                "and answers are not cut"
            )
        self.train.length_at(0, self.sequence_length)
        if self.model.vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {self.model.vocab_size}, smaller than tokenizer.vocab_size "
                f"{self.tokenizer.vocab_size}; leave model.vocab_size out, it follows the tokenizer"
            )
        if self.train.epochs is not None and self.data.streams:
            raise ConfigError(
                f"train.epochs is {self.train.epochs}, but {self.data.name} is streamed and its samples cannot be counted "
                "before the training; expected train.steps, or data.streaming = false"
            )
        if self.train.lean and self.lora.rank:
            raise ConfigError(
                f"train.lean is true and lora.rank is {self.lora.rank}; an adapter is small as it is: expected one of them"
            )
        if self.train.float8 and self.lora.rank:
            raise ConfigError(
                f"train.float8 is true and lora.rank is {self.lora.rank}; its frozen layers are not taken: expected one of them"
            )
        if self.train.neftune_alpha and self.data.kind != "chat":
            raise ConfigError(
                f"train.neftune_alpha is {self.train.neftune_alpha}, but data.kind is '{self.data.kind}'; expected 0, as this "
                "noise is for tuning on conversations (anarcho sft)"
            )
        adapter_shapes(self.model, self.lora)

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence: `train.sequence_length`, or the model's context length."""
        return self.train.sequence_length or self.model.context_length

    @property
    def batch_sequences(self) -> int:
        """Sequences per optimizer step."""
        return self.train.batch_sequences(self.sequence_length)

    @property
    def bucket_sequences(self) -> int:
        """How many sequences' worth of tokens a batch of pairs of answers has; the pairs are batched alike on every machine."""
        if self.train.micro_batch != "auto":
            return self.train.micro_batch
        sizes = [size for size in divisors(self.batch_sequences) if size * self.sequence_length <= PAIR_BATCH_TOKENS]
        return max(sizes, default=1)

    @property
    def total_tokens(self) -> int:
        """Tokens that the whole run trains on, repetitions included."""
        return self.train.steps * self.train.batch_tokens

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the training for a token."""
        return training_flops_per_token(self.model, self.sequence_length, frozen=self.lora.rank > 0)

    @property
    def trained_parameters(self) -> int:
        """Numbers that the run learns: all of the model's, or the adapter's."""
        if not self.lora.rank:
            return self.model.num_parameters
        return sum(rows * columns for rows, columns in adapter_shapes(self.model, self.lora).values())


SECTIONS: dict[str, type] = typing.get_type_hints(RunConfig)


def resolve(
    *,
    preset: str | None = DEFAULT_PRESET,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    options: Sequence[Layer] = (),
) -> RunConfig:
    """The configuration of defaults < ``preset`` < ``file`` < ``overrides`` (``--set`` texts) < ``options``.

    ``options`` are layers of command-line options of their own, such as ``--data``. `model.vocab_size` follows
    `tokenizer.vocab_size` unless a layer gives it, and `train.sequence_length` follows `model.context_length`.
    Raises ConfigError (or the package's ValueError) in one sentence that names the layer and the key.
    """
    return _from_layers([*_layers(preset, file, overrides), *options])


def check_sections(
    names: Iterable[str], *, preset: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()
) -> None:
    """Raises what `resolve` would about these sections, each by itself: of a run whose other sections are not known yet."""
    _sections_of(_layers(preset, file, overrides), names)


def _layers(preset: str | None, file: Path | None, overrides: Sequence[str]) -> list[Layer]:
    layers = [] if preset is None else [preset_layer(preset)]
    layers += [] if file is None else [file_layer(file)]
    return [*layers, set_layer(overrides)]


def loads(text: str, *, origin: str) -> RunConfig:
    """The configuration of a TOML text over the defaults alone; ``origin`` names it in errors."""
    return _from_layers([parse_layer(text, origin=origin)])


def load(path: Path) -> RunConfig:
    """The configuration of a TOML file over the defaults alone, such as a run's own `config.toml`."""
    return _from_layers([file_layer(path)])


def _from_layers(layers: Sequence[Layer]) -> RunConfig:
    built = _sections_of(layers, SECTIONS)
    if built["train"].sequence_length is None:
        built["train"] = dataclasses.replace(built["train"], sequence_length=built["model"].context_length)
    return RunConfig(**built)


def _sections_of(layers: Sequence[Layer], names: Iterable[str]) -> dict[str, Any]:
    for layer in layers:
        _check_names(layer)
    sections, origins = merge(_with_one_length(layers))
    built: dict[str, Any] = {}
    for section in sorted(names, key=lambda name: name != "tokenizer"):
        values = dict(sections.get(section, {}))
        if section == "model" and "tokenizer" in built:
            values.setdefault("vocab_size", built["tokenizer"].vocab_size)
        origin = {key: origins.get((section, key), "tokenizer.vocab_size") for key in values}
        built[section] = schema.build(section, SECTIONS[section], values, origin)
    return built


def _with_one_length(layers: Sequence[Layer]) -> list[Layer]:
    """The layers without the `train.steps` of those under one that gives `train.epochs`, and the other way round."""
    kept: list[Layer] = []
    hidden: set[str] = set()
    for layer in reversed(layers):
        values = layer.sections.get("train", {})
        given = {key for key in ("steps", "epochs") if values.get(key, schema.NONE) != schema.NONE}
        if len(given) == 2:
            raise ConfigError(f"{layer.origin}: both train.steps and train.epochs are given; leave one of them out")
        if given & hidden:
            rest = {key: value for key, value in values.items() if key not in hidden}
            layer = dataclasses.replace(layer, sections={**layer.sections, "train": rest})
        elif given and not hidden:
            hidden = {"steps", "epochs"} - given
        kept.insert(0, layer)
    return kept


def _check_names(layer: Layer) -> None:
    """Raise ConfigError where a layer names a section or a key that does not exist."""
    for section, values in layer.sections.items():
        if section not in SECTIONS:
            raise ConfigError(
                f"{layer.origin}: unknown section [{section}]{suggestion(section, SECTIONS)}; "
                f"the sections are {', '.join(SECTIONS)}"
            )
        for key in values:
            schema.check_key(SECTIONS, section, key, layer.origin)


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Section -> key -> value in TOML's own types; an absent value is written as "none", and no steps beside epochs."""
    sections = {
        section: {key: _toml_value(value) for key, value in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }
    if config.train.epochs is not None:
        del sections["train"]["steps"]
    return sections


def _toml_value(value: Any) -> Any:
    if value is None:
        return schema.NONE
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_toml_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _toml_value(item) for key, item in value.items()}
    return value


def section_values(section: Any) -> dict[str, Any]:
    """A section's dataclass as key -> value in TOML's own types, for a layer."""
    return {key: _toml_value(value) for key, value in dataclasses.asdict(section).items()}


def dumps(config: RunConfig) -> str:
    """The whole configuration as TOML; `loads` gives an equal value."""
    return tomli_w.dumps(to_dict(config))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the configuration file."""
    document = schema.json_schema(SECTIONS, title="AnarchoBot run configuration")
    document["properties"] |= {key: {"type": "string", "enum": list(values)} for key, values in ROOT_KEYS.items()}
    return document
