"""`anarcho data prepare --rank --world` and `anarcho data merge`: what ranks say, and a run's data that they made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = "whale ship sea captain harpoon mast sail wave island boat".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, of which each rank of two has one."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("a.jsonl", 60), ("b.jsonl", 40)):
        texts = (" ".join(WORDS[number % 7 : 3 + number % 11] * 9) for number in range(count))
        rows = [json.dumps({"text": f"{name} {number} {text}"}) for number, text in enumerate(texts)]
        (folder / name).write_text("\n".join([*rows, "{broken"]))
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from anarcho_tokenize import TokenizerConfig, train_tokenizer

    directory = tmp_path_factory.mktemp("tokenizers") / "small"
    texts = (row["text"] for row in map(json.loads, (corpus / "a.jsonl").read_text().splitlines()[:-1]))
    train_tokenizer(texts, config=TokenizerConfig(vocab_size=300)).save(directory)
    return directory


def test_ranks_say_what_is_left_to_do_and_the_merge_is_a_runs_data(
    corpus: Path, tokenizer: Path, tmp_path: Path, anarcho, refused
) -> None:
    from anarcho_cli.config import resolve
    from anarcho_cli.data import open_run_data

    options = [corpus, "--tokenizer", tokenizer, "--set", "data.validation_fraction=0.2"]
    one, out = tmp_path / "one", tmp_path / "data"
    whole = json.loads(anarcho("data", "prepare", *options, "--out", one, "--json").stdout)

    second = anarcho("data", "prepare", *options, "--out", out, "--rank", 1, "--world", 2)
    assert second.stdout.splitlines()[-1] == str(out)
    assert "rank 1 is done; of 2 ranks, rank 0 has not begun" in second.stderr
    assert "rows of this rank cannot be used" in second.stderr
    assert "rank 0 has not begun" in refused("data", "merge", out)
    ranks = json.loads(anarcho("data", "inspect", out, "--json").stdout)["ranks"]
    assert [(rank["has_begun"], rank["is_done"]) for rank in ranks] == [(False, False), (True, True)]
    assert "not begun" in anarcho("data", "inspect", out).stdout

    first = anarcho("data", "prepare", *options, "--out", out, "--rank", 0, "--world", 2, "--json")
    assert f"`anarcho data merge {out}`" in first.stderr
    assert [rank["is_done"] for rank in json.loads(first.stdout)["ranks"]] == [True, True]
    merged = json.loads(anarcho("data", "merge", out, "--json").stdout)
    assert merged["splits"] == whole["splits"]
    again = anarcho("data", "prepare", *options, "--out", out, "--rank", 0, "--world", 2)
    assert "is merged already" in again.stderr

    settings = [f"data.source={corpus}", "data.validation_fraction=0.2", "tokenizer.vocab_size=300"]
    config = resolve(preset="quickstart", file=None, overrides=[*settings, "train.sequence_length=64"])
    batches = []
    for directory in (one, out):
        with open_run_data(config, tokenizer, directory) as data:
            batches.append((data.sha256, data.train.batch(3, 4).tokens.tolist()))
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", 0], ["--rank", "--world"]),
        (["--world", 2], ["--rank", "--world"]),
        (["--rank", 2, "--world", 2], ["rank is 2 of 2", "from 0 to 1"]),
        (["--rank", -1, "--world", 2], ["rank is -1 of 2"]),
        (["--rank", 0, "--world", 0], ["of 0", "at least 1"]),
    ],
)
def test_ranks_that_make_no_sense_are_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path, refused, options: list[object], words: list[str]
) -> None:
    message = refused("data", "prepare", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "data", *options)
    assert all(word in message for word in words), message
    assert not (tmp_path / "data").exists()


def test_ranks_of_another_command_and_a_missing_tokenizer_are_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path, anarcho, refused
) -> None:
    out = tmp_path / "data"
    command = ["data", "prepare", corpus, "--out", out, "--rank", 0]
    assert "absent" in refused(*command, "--world", 2, "--tokenizer", tmp_path / "absent")
    assert not out.exists()
    assert anarcho(*command, "--world", 2, "--tokenizer", tokenizer).exit_code == 0
    assert "begun by 2 ranks" in refused(*command, "--world", 3, "--tokenizer", tokenizer)
    message = refused(*command, "--world", 2, "--tokenizer", tokenizer, "--set", "data.shard_tokens=9")
    assert "other values of shard_tokens" in message
    assert "shared by 2 ranks" in refused("data", "prepare", corpus, "--out", out, "--tokenizer", tokenizer)
    assert "nothing to merge" in refused("data", "merge", tmp_path / "absent")
