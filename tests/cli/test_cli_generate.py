"""`anarcho generate` with a tiny untrained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anarcho_cli.back_ends import torch as back_end
from anarcho_cli.config import RunConfig, SampleConfig
from anarcho_cli.output import printable
from anarcho_cli.run_sample import write_sample
from anarcho_cli.writing import Writer
from anarcho_model import ModelConfig
from anarcho_model.generate.sampling import SamplingConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import load_pretrained, save_pretrained
from anarcho_tokenize import Tokenizer, TokenizerConfig, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizer; context 32, vocabulary 285."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(directory)
    network = GPT(ModelConfig(vocab_size=285, context_length=32, num_layers=1, dim=16, num_heads=2))
    network.init_weights(seed=0)
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return directory


def biased(model: Path, token: int) -> Writer:
    """The model with an embedding that makes ``token`` the likeliest next one, whatever went before."""
    writer = Writer.load(model, device="cpu")
    with torch.no_grad():
        weight = writer.model.model.embed_tokens.weight.zero_()
        weight[:, 0] = -1
        weight[token, 0] = -2
    return writer


def test_streamed_text_equals_the_whole_text(model: Path, anarcho) -> None:
    arguments = ["generate", model, "the whale", "--seed", 3, "-n", 12, "--device", "cpu"]
    streamed = anarcho(*arguments)
    assert streamed.exit_code == 0, streamed.output
    whole = json.loads(anarcho(*arguments, "--json").stdout)
    assert streamed.stdout == whole["text"] + "\n"
    assert whole["new_tokens"] == 12
    assert whole["stopped_by"] == "length"
    assert whole["model"] == str(model)


def test_the_same_seed_repeats_a_text_and_another_does_not(model: Path, anarcho) -> None:
    def text(seed: int) -> str:
        return anarcho("generate", model, "the", "--seed", seed, "-n", 20, "--device", "cpu").stdout

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_prompt_may_come_from_standard_input(model: Path, anarcho) -> None:
    arguments = [model, "-t", 0, "-n", 4, "--device", "cpu", "--json"]
    for extra in ([], ["-"]):
        result = anarcho("generate", *arguments[:1], *extra, *arguments[1:], input="the sea\n")
        assert json.loads(result.stdout)["prompt"] == "the sea"


def test_a_prompt_begins_a_document_as_in_training(model: Path) -> None:
    writer = Writer.load(model, device="cpu")
    assert writer.prompt_ids("the") == [writer.tokenizer.eot_id, *Tokenizer.load(model).encode("the")]
    assert writer.prompt_ids("") == [writer.tokenizer.eot_id]


def test_a_text_ends_with_the_document(model: Path) -> None:
    eot = Tokenizer.load(model).eot_id
    ended = biased(model, eot).complete("the", config=SamplingConfig(temperature=0, max_new_tokens=100))
    assert (ended.text, ended.new_tokens, ended.stopped_by) == ("", 0, "end_of_text")


def test_a_text_ends_where_the_context_is_full(model: Path) -> None:
    letter = Tokenizer.load(model).encode("w")[0]
    full = biased(model, letter).complete("the", config=SamplingConfig(temperature=0, max_new_tokens=100))
    assert full.stopped_by == "context"
    assert full.prompt_tokens + full.new_tokens == 32


def test_half_a_character_is_held_back_until_it_is_whole(model: Path) -> None:
    byte = Tokenizer.load(model).encode("é")[0]
    pieces = list(biased(model, byte).stream("the", config=SamplingConfig(temperature=0, max_new_tokens=3)))
    assert all(pieces), "an empty piece was handed on"
    assert set("".join(pieces)) == {"\ufffd"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["x" * 200], "context"),
        (["a", "-t", "-1"], "sample.temperature"),
        (["a", "--top-k", "0"], "sample.top_k"),
        (["a", "--top-p", "1.5"], "sample.top_p"),
        (["a", "-n", "-3"], "sample.max_new_tokens"),
    ],
)
def test_bad_sampling_or_prompt_is_refused(arguments: list[str], part: str, model: Path, refused) -> None:
    assert part in refused("generate", model, *arguments, "--device", "cpu")


def test_a_path_without_a_model_is_refused(tmp_path: Path, refused) -> None:
    assert "absent" in refused("generate", tmp_path / "absent", "a", "--device", "cpu")
    assert "holds no model" in refused("generate", tmp_path, "a", "--device", "cpu")


def test_a_prompt_that_is_no_utf8_is_refused(model: Path, refused) -> None:
    assert "not UTF-8" in refused("generate", model, "--device", "cpu", input=b"caf\xe9")


def test_damaged_weights_are_refused_by_name(model: Path, tmp_path: Path, refused) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "model.safetensors" in refused("generate", broken, "a", "--device", "cpu")


def test_control_characters_never_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9b\n\tc\r") == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffd"
    assert printable("naïve 鯨 🐋") == "naïve 鯨 🐋"


def test_several_prompts_are_written_together_each_as_alone(model: Path, anarcho) -> None:
    prompts = ["the whale", "the sea and the ship", ""]
    options = ["-n", 9, "--device", "cpu", "--json"]
    together = anarcho("generate", model, *prompts, "--seed", 5, "--slots", 2, *options)
    rows = [json.loads(line) for line in together.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = json.loads(anarcho("generate", model, prompt, "--seed", 5 + number, *options).stdout)
        assert {**row, "seconds": 0} == {**alone, "seconds": 0}


def test_prompts_come_from_lines_rows_and_standard_input(model: Path, tmp_path: Path, anarcho) -> None:
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("the whale\r\n\nthe sea\u2028x\n", encoding="utf-8")
    rows.write_text('{"prompt": "the\\nsea"}\n{"text": "a ship"}\n"the"\n')

    def read(*arguments: object, **options: object) -> list[str]:
        result = anarcho("generate", model, *arguments, "-n", 1, "--device", "cpu", "--json", **options)
        assert result.exit_code == 0, result.output
        return [json.loads(line)["prompt"] for line in result.stdout.removesuffix("\n").split("\n")]

    assert read("--prompts", lines) == ["the whale", "the sea\u2028x"]
    assert read("first", "--prompts", rows) == ["first", "the\nsea", "a ship", "the"]
    assert read("--prompts", "-", input="a\nb\n") == ["a", "b"]
    assert read("x", "-", input="a\nb\n") == ["x", "a\nb"]


def test_several_texts_are_printed_with_their_prompts(model: Path, anarcho) -> None:
    options = ["-n", 4, "-t", 0, "--device", "cpu"]
    found = anarcho("generate", model, "the", "sea", *options).stdout
    first, second = (anarcho("generate", model, prompt, *options).stdout for prompt in ("the", "sea"))
    assert found == f"--- 1 of 2\nthe{first}--- 2 of 2\nsea{second}"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('"the"\n{', ":2 is no JSON"),
        ('{"question": "the"}', ":1 has no text"),
        ("3", ":1 has no text"),
        ("\n", "holds no prompt"),
        (json.dumps("the") + "\n" + json.dumps("x" * 200), "Prompt 2: "),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_by_their_place(content, part, model: Path, tmp_path, refused) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert part in refused("generate", model, "--prompts", file, "--device", "cpu")
    assert "more than once" in refused("generate", model, "-", "--prompts", "-", "--device", "cpu")
    assert "absent" in refused("generate", model, "--prompts", tmp_path / "absent", "--device", "cpu")


@pytest.fixture(scope="module")
def spoilt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with weights that are NaN."""
    directory = tmp_path_factory.mktemp("spoilt") / "model"
    shutil.copytree(model, directory)
    network, tokenizer = load_pretrained(directory), Tokenizer.load(directory)
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.nan)
    save_pretrained(network, directory, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return directory


@pytest.mark.parametrize(
    "arguments",
    [["the"], ["the", "-t", 0], ["the", "--json"], ["the", "the sea"], ["the", "--backend", "mlx"]],
    ids=str,
)
def test_a_model_of_nan_is_refused_in_one_sentence(arguments: list[object], spoilt: Path, refused) -> None:
    if "mlx" in arguments:
        pytest.importorskip("mlx.core")
    assert "logits are NaN or infinite" in refused("generate", spoilt, *arguments, "--device", "cpu")


def test_a_conversation_and_an_evaluation_of_a_model_of_nan_are_refused(spoilt: Path, refused) -> None:
    said = refused("chat", spoilt, "--device", "cpu", input="the whale\n")
    assert "logits are NaN or infinite" in said
    assert "logits are NaN or infinite" in refused("eval", spoilt, "--limit", 1, "--device", "cpu")


def test_a_run_whose_model_is_of_nan_ends_without_a_sample(spoilt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    step: Any = SimpleNamespace(model=load_pretrained(spoilt))
    tokenizer = TokenizerConfig(vocab_size=285)
    config = RunConfig(model=step.model.config, tokenizer=tokenizer, sample=SampleConfig(max_new_tokens=4))
    assert write_sample(config, back_end, step, Tokenizer.load(spoilt)) is None
    said = capfd.readouterr().err
    assert said.startswith("anarcho: no sample: The model's logits are NaN or infinite")
    assert said.count("\n") == 1


@pytest.mark.parametrize("option", [["-t", 1e-300], ["--top-p", 1e-50]], ids=str)
def test_the_likeliest_text_is_what_the_smallest_settings_give(option: list[object], model: Path, anarcho) -> None:
    def text(*options: object) -> str:
        result = anarcho("generate", model, "the", "-n", 9, *options, "--device", "cpu")
        assert result.exit_code == 0, result.output
        return result.stdout

    assert text(*option) == text("-t", 0)
