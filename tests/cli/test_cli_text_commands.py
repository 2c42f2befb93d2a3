"""`anarcho tokenizer` and `anarcho data`, on a text of a few kilobytes."""

from __future__ import annotations

import hashlib
import json
import random
import textwrap
from pathlib import Path

import pytest
import sentencepiece

WORDS = ("the", "whale", "sea", "ship", "captain", "white", "boat", "harpoon", "crew", "night", "wind", "sail", "deck")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of random sentences, as JSON lines."""
    chance = random.Random(0)
    documents = [" ".join(chance.choices(WORDS, k=120)) + "." for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def tokenizer(corpus: Path, tmp_path: Path, anarcho) -> Path:
    """A tokenizer of 300 pieces trained through the command line."""
    out = tmp_path / "tokenizer"
    result = anarcho("tokenizer", "train", corpus, "--vocab-size", 300, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(out)]
    return out


def test_a_trained_tokenizer_can_be_inspected(tokenizer: Path, corpus: Path, anarcho) -> None:
    result = anarcho("tokenizer", "inspect", tokenizer, "--text", "the whale", "--source", corpus, "--json")
    [facts] = json.loads(result.stdout)["tokenizers"]
    assert facts["vocab_size"] == 300
    assert facts["special_tokens"]["<|endoftext|>"] == 1
    assert facts["documents"] == 40
    assert facts["text_tokens"]
    assert [script["script"] for script in facts["scripts"]] == ["Latin"]
    assert facts["tokens_per_word"] == facts["tokens"] / facts["words"]
    shown = anarcho("tokenizer", "inspect", tokenizer, "--text", "the whale\x1b").stdout
    assert facts["sha256"] in shown
    assert "\x1b" not in shown, "control characters of a text must not reach the terminal"


def test_inspecting_reads_no_more_than_it_is_asked_to(tokenizer: Path, corpus: Path, anarcho) -> None:
    result = anarcho("tokenizer", "inspect", tokenizer, "--source", corpus, "--source-bytes", 1, "--json")
    [facts] = json.loads(result.stdout)["tokenizers"]
    assert facts["documents"] == 1


def test_a_foreign_model_is_taken_over_and_compared(tokenizer: Path, corpus: Path, tmp_path: Path, anarcho) -> None:
    model = tmp_path / "foreign.model"
    lines = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    with model.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=stream, vocab_size=60, model_type="bpe", minloglevel=2
        )
    out = tmp_path / "deep" / "taken-over"
    result = anarcho("tokenizer", "import", model, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "directory": str(out),
        "vocab_size": 65,
        "sha256": hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest(),
    }
    assert [path.name for path in out.parent.iterdir()] == ["taken-over"], "nothing of the writing is left behind"
    shown = anarcho("tokenizer", "inspect", tokenizer, out, "--source", corpus, "--text", "the whale").stdout
    assert str(tokenizer) in shown
    assert "nmt_nfkc" in shown
    assert "Latin" in shown


def test_what_is_no_model_is_not_taken_over(corpus: Path, tmp_path: Path, refused) -> None:
    assert "is not a SentencePiece model" in refused("tokenizer", "import", corpus, "--out", tmp_path / "out")
    assert "absent.model" in refused("tokenizer", "import", tmp_path / "absent.model", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "0 files" in refused("tokenizer", "import", tmp_path / "empty", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversations_can_train_a_tokenizer_by_the_keys_of_a_file(tmp_path: Path, anarcho) -> None:
    turns = [{"role": "user", "content": "where is the whale"}, {"role": "assistant", "content": "in the sea"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    settings = f"""
        [data]
        source = "{tmp_path / "chat.jsonl"}"
        kind = "chat"
        [tokenizer]
        vocab_size = 290
        user_symbols = ["<think>"]
        normalization = "nfc"
    """
    (tmp_path / "settings.toml").write_text(textwrap.dedent(settings))
    out = tmp_path / "out"
    result = anarcho("tokenizer", "train", "--config", tmp_path / "settings.toml", "--out", out)
    assert result.exit_code == 0, result.output
    result = anarcho("tokenizer", "inspect", out, "--text", "<think>", "--json")
    [facts] = json.loads(result.stdout)["tokenizers"]
    assert (facts["vocab_size"], facts["normalization"], len(facts["text_tokens"])) == (290, "nfc", 1)


def test_prepared_data_can_be_inspected_and_verified(tokenizer: Path, corpus: Path, tmp_path: Path, anarcho) -> None:
    out = tmp_path / "data"
    arguments = ["data", "prepare", corpus, "--tokenizer", tokenizer, "--out", out]
    result = anarcho(*arguments, "--set", "data.validation_fraction=0.2", "--json")
    assert result.exit_code == 0, result.output
    splits = json.loads(result.stdout)["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 40
    assert json.loads(anarcho("data", "inspect", out, "--verify", "--json").stdout) == splits
    shown = anarcho("data", "inspect", out, "--tokenizer", tokenizer).stdout
    assert str(splits["train"]["tokens"]) in shown
    assert any(word in shown for word in WORDS), "the first document is shown"


def test_a_damaged_shard_is_refused_by_name(tokenizer: Path, corpus: Path, tmp_path: Path, anarcho, refused) -> None:
    out = tmp_path / "data"
    anarcho("data", "prepare", corpus, "--tokenizer", tokenizer, "--out", out)
    shard = out / "train" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    assert "shard-00000.bin" in refused("data", "inspect", out, "--verify")


def test_an_existing_output_is_refused_and_left_alone(tokenizer: Path, corpus: Path, tmp_path: Path, refused) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "exists already" in refused("tokenizer", "train", corpus, "--vocab-size", 300, "--out", out)
    assert "exists already" in refused("data", "prepare", corpus, "--tokenizer", tokenizer, "--out", out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert "is a file" in refused("tokenizer", "train", corpus, "--out", out / "precious" / "below")


def test_a_vocabulary_too_large_for_the_text_is_refused(corpus: Path, tmp_path: Path, refused) -> None:
    message = refused("tokenizer", "train", corpus, "--vocab-size", 30000, "--out", tmp_path / "out")
    assert "vocab_size" in message
    assert "30000" in message
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_missing_is_refused_by_name(tokenizer: Path, tmp_path: Path, refused) -> None:
    absent = tmp_path / "absent.txt"
    assert "absent.txt" in refused("tokenizer", "train", absent, "--out", tmp_path / "out")
    assert "absent.txt" in refused("data", "prepare", absent, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert "absent" in refused("data", "prepare", "--tokenizer", tmp_path / "absent", "--out", tmp_path / "out")
    assert "absent" in refused("tokenizer", "inspect", tmp_path / "absent")
    assert "absent" in refused("data", "inspect", tmp_path / "absent")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_no_utf8_is_refused_by_name(tmp_path: Path, refused) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    assert "latin.txt" in refused("tokenizer", "train", tmp_path / "latin.txt", "--out", tmp_path / "out")
