"""Configuration: layers, presets, checks across sections, and the way to TOML and back."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from anarcho_cli.config import SECTIONS, ConfigError, RunConfig, dumps, json_schema, load, loads, resolve, to_dict
from anarcho_cli.layers import Layer, parse_layer, preset_names, preset_text, set_layer
from hypothesis import given, settings
from hypothesis import strategies as st

# What the tests of refusals start from, whatever the presets are tuned to.
BASE = [
    "tokenizer.vocab_size=4096",
    "model.dim=256",
    "model.num_heads=4",
    "model.context_length=256",
    "train.sequence_length=256",
    "train.batch_tokens=4096",
]


def test_a_later_layer_overrides_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[train]\nsteps = 7\nseed = 5\n")
    assert resolve(preset=None).model.num_layers != 6
    option = Layer(origin="--data", sections={"data": {"source": "d.txt"}})
    config = resolve(preset="small-15m", file=file, overrides=["train.seed=6", "data.source=c.txt"], options=[option])
    assert config.model.num_layers == 6, "the preset overrides the default"
    assert config.train.steps == 7, "the file overrides the preset"
    assert config.train.seed == 6, "--set overrides the file"
    assert config.data.source == "d.txt", "an option of its own overrides --set"


def test_without_any_layer_every_section_has_the_packages_defaults() -> None:
    config = resolve(preset=None)
    assert config.optim == SECTIONS["optim"]()
    assert config.model == SECTIONS["model"]()
    assert config.train == dataclasses.replace(SECTIONS["train"](), sequence_length=config.model.context_length)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_resolves_and_says_what_it_is_for(preset: str) -> None:
    config = resolve(preset=preset)
    assert config.total_tokens == config.train.steps * config.batch_sequences * config.sequence_length
    assert preset_text(preset).startswith("# ")


def test_the_reference_preset_has_the_reference_number_of_parameters() -> None:
    model = resolve(preset="reference-137m").model
    assert model.num_parameters == 137_841_408
    assert (model.num_layers, model.dim, model.num_heads, model.ffn_size) == (12, 768, 12, 3072)
    assert (model.vocab_size, model.context_length) == (32000, 4096)


@pytest.mark.parametrize("preset", preset_names())
def test_a_resolved_preset_written_as_toml_loads_as_an_equal_value(preset: str, tmp_path: Path) -> None:
    config = resolve(preset=preset)
    file = tmp_path / "config.toml"
    file.write_text(dumps(config))
    assert load(file) == config
    assert resolve(preset="quickstart", file=file) == config, "a resolved file leaves nothing to the preset"


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda value: value != "none")


@settings(max_examples=60, deadline=None)
@given(
    prompt=text,
    source=text,
    lr=st.floats(1e-12, 1e6),
    adamw_lr=st.none() | st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**63 - 1),
    stops=st.lists(st.integers(0, 9)),
    scaled=st.booleans(),
)
def test_any_configuration_written_as_toml_loads_as_an_equal_value(
    prompt: str, source: str, lr: float, adamw_lr: float | None, seed: int, stops: list[int], scaled: bool
) -> None:
    base = resolve(overrides=["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"] if scaled else [])
    config = dataclasses.replace(
        base,
        sample=dataclasses.replace(base.sample, prompt=prompt, stop_token_ids=tuple(stops)),
        data=dataclasses.replace(base.data, source=source),
        optim=dataclasses.replace(base.optim, lr=lr, adamw_lr=adamw_lr),
        train=dataclasses.replace(base.train, seed=seed),
    )
    assert loads(dumps(config), origin="test") == config


def test_the_written_toml_holds_every_key_so_that_later_defaults_change_nothing() -> None:
    written = tomllib.loads(dumps(resolve()))
    for section, config_class in SECTIONS.items():
        assert set(written[section]) == {field.name for field in dataclasses.fields(config_class)}


def test_none_takes_a_value_away_that_an_earlier_layer_gave() -> None:
    assert resolve(overrides=["sample.top_k=5"]).sample.top_k == 5
    assert resolve(overrides=["sample.top_k=5", "sample.top_k=none"]).sample.top_k is None


def test_the_models_vocabulary_follows_the_tokenizers_unless_given() -> None:
    assert resolve(overrides=["tokenizer.vocab_size=999"]).model.vocab_size == 999
    assert resolve(overrides=["tokenizer.vocab_size=999", "model.vocab_size=1024"]).model.vocab_size == 1024


def test_the_sequence_length_follows_the_context_length_unless_given() -> None:
    config = resolve(preset=None, overrides=["model.context_length=512"])
    assert config.train.sequence_length == config.sequence_length == 512
    assert RunConfig().sequence_length == RunConfig().model.context_length


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stps=1", ["--set", "train.stps", "did you mean 'train.steps'?", "batch_tokens"]),
        ("train.lr=1", ["train.lr", "did you mean 'optim.lr'?"]),
        ("tran.steps=1", ["[tran]", "did you mean 'train'?"]),
        ("train.steps=ten", ["--set: train.steps", '"ten"', "a whole number"]),
        ("train.steps=1.5", ["train.steps", "1.5", "a whole number"]),
        ("train.steps=true", ["train.steps", "true", "a whole number"]),
        ("optim.nesterov=1", ["optim.nesterov", "1", "true or false"]),
        ("optim.lr=fast", ["optim.lr", '"fast"', "a number"]),
        ("data.source=3", ["data.source", "3", "a string"]),
        ("optim.schedule=cos", ["optim.schedule", '"cos"', '"cosine"']),
        ("model.num_kv_heads=x", ["model.num_kv_heads", '"x"', 'a whole number, or "none"']),
        ("sample.stop_token_ids=[1, 'a']", ["sample.stop_token_ids", '"a"', "whole numbers"]),
        ("model.rope_scaling.kin=1", ["model.rope_scaling"]),
        ("model.rope_scaling=4", ["model.rope_scaling", "4", "a table"]),
        ("model.num_heads=5", ["model.num_heads", "5", "256"]),
        ("model.head_dim=3", ["model.head_dim", "3", "even"]),
        ("model.context_length=128", ["train.sequence_length", "256", "model.context_length", "128"]),
        ("train.batch_tokens=1000", ["train.batch_tokens", "1000", "256"]),
        ("model.vocab_size=10", ["model.vocab_size", "10", "tokenizer.vocab_size", "4096"]),
        ("train.steps=0", ["train.steps", "0"]),
        ("train", ["'train'", "section.key=value"]),
        ("steps=5", ["'steps=5'", "section.key=value"]),
        ("train.=5", ["section.key=value"]),
        ("data.source=[1", ["data.source=[1", "not valid TOML"]),
        ('data.source="a', ["not valid TOML"]),
    ],
)
def test_a_bad_override_is_refused_with_key_found_and_expected(override: str, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        resolve(preset=None, overrides=[*BASE, override])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[train]\nsteps = 5\nseed 7\n", ["my.toml:3", "not valid TOML"]),
        ("[train\n", ["my.toml:1", "not valid TOML"]),
        ('[data]\nsource = "abc\n', ["my.toml:2", "not valid TOML"]),
        ("steps = 5\n", ["my.toml", "'steps'", "section"]),
        ("[train]\nstep = 5\n", ["my.toml", "did you mean 'train.steps'?"]),
        ("[train]\nsteps = 1979-05-27\n", ["my.toml: train.steps", "1979-05-27", "a whole number"]),
        ("[model.rope_scaling]\nkind = 'linear'\nfactr = 2\n", ["model.rope_scaling.factor is missing"]),
        (
            "[model.rope_scaling]\nkind = 'linear'\nfactor = 2\nfactr = 2\n",
            ["unknown key 'model.rope_scaling.factr'", "did you mean 'factor'?"],
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_line_or_key(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(file=file)
    for part in parts:
        assert part in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml is not there"):
        resolve(file=tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="is a directory"):
        resolve(file=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[data]\nsource = '\xe9'\n")
    with pytest.raises(ConfigError, match=r"latin.toml is not UTF-8 text \(byte 17\)"):
        resolve(file=tmp_path / "latin.toml")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_text("[train]\nsteps = 3\n", encoding="utf-8-sig")
    assert resolve(file=tmp_path / "bom.toml").train.steps == 3


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'quikstart' \(did you mean 'quickstart'\?\)"):
        resolve(preset="quikstart")
    with pytest.raises(ConfigError, match=r"unknown preset .\.\./config."):
        resolve(preset="../config")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("1_000", 1000),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"10"', "10"),
        ("embedded", "embedded"),
        ("a/b *.txt", "a/b *.txt"),
        ("2024-01-01", "2024-01-01"),
        ("a=b", "a=b"),
        ("", ""),
        ("1\nsteps = 2", "1\nsteps = 2"),
    ],
)
def test_set_reads_toml_values_and_takes_bare_words_as_strings(text: str, value: object) -> None:
    assert set_layer([f"data.key={text}"]).sections == {"data": {"key": value}}


def test_set_reaches_into_a_table_within_a_section() -> None:
    sections = set_layer(["model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"]).sections
    assert sections == {"model": {"rope_scaling": {"kind": "linear", "factor": 2}}}
    with pytest.raises(ConfigError, match="plain value"):
        set_layer(["model.rope_scaling=1", "model.rope_scaling.kind=linear"])


def test_presets_are_toml_of_known_keys_alone() -> None:
    for name in preset_names():
        for section, values in parse_layer(preset_text(name), origin=name).sections.items():
            assert set(values) <= {field.name for field in dataclasses.fields(SECTIONS[section])}


def test_the_schema_describes_every_key_and_accepts_no_other() -> None:
    schema = json_schema()
    for section, config_class in SECTIONS.items():
        part = schema["properties"][section]
        assert set(part["properties"]) == {field.name for field in dataclasses.fields(config_class)}
        assert part["additionalProperties"] is False
        for key, entry in part["properties"].items():
            assert entry.get("description"), f"{section}.{key} has no docstring under it"
    assert '"null"' not in json.dumps(schema), "TOML has no null"


def test_plain_values_of_a_configuration_are_what_json_and_toml_can_hold() -> None:
    plain = to_dict(resolve())
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
