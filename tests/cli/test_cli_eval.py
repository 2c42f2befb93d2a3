"""`anarcho eval` on texts and tasks with tiny models."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_cli.evaluation.answers import evaluate_task
from anarcho_cli.evaluation.report import shown
from anarcho_cli.evaluation.statistics import mean
from anarcho_cli.evaluation.subject import Subject
from anarcho_cli.evaluation.tasks import read_task
from anarcho_model import ModelConfig
from anarcho_model.config import InitConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import save_pretrained
from anarcho_tokenize import TokenizerConfig, train_tokenizer

Write = Callable[[str, Sequence[Any]], Path]

QUESTIONS = [
    {"question": "Where is the whale?", "choices": ["the sea", "the ship, the ship"], "answer": 0},
    {"context": "The ship", "choices": [" and the sea", "whale"], "answer": "B"},
    {"question": "Which?", "choices": {"text": ["sea", "ship", "the"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    {"prompt": "the", "choices": ["whale", "ship and sea"], "answer": "ship and sea"},
]
PAIRS = [
    {"prompt": "the ship", "chosen": "the sea", "rejected": "the whale, the whale"},
    {"prompt": "the sea", "chosen": "whale and ship and whale", "rejected": "the"},
]
WORDS = [{"text": "the whale and the sea"}, {"text": "the sea and the ship "}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model directories with one tokenizer; context 128."""
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    paths = []
    for seed in (0, 1):
        paths.append(tmp_path_factory.mktemp(f"model{seed}"))
        tokenizer.save(paths[-1])
        network = GPT(ModelConfig(vocab_size=285, context_length=128, num_layers=1, dim=16, num_heads=2))
        network.init_weights(seed=seed, init=InitConfig(embedding_std=0.5, zero_residual_outputs=False))
        save_pretrained(network, paths[-1], eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return paths[0], paths[1]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON lines."""

    def lines(name: str, rows: Sequence[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return lines


@pytest.fixture
def evaluated(anarcho) -> Callable[..., Any]:
    """The JSON of a command that must work."""

    def run(*arguments: object) -> Any:
        result = anarcho("eval", *arguments, "--json", "--device", "cpu")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def logprob(subject: Subject, context: str, continuation: str) -> float:
    """Directly, of texts whose tokens do not reach over the border."""
    before = [subject.tokenizer.eot_id, *subject.tokenizer.encode(context)]
    ids = torch.tensor([[*before, *subject.tokenizer.encode(context + continuation)[len(before) - 1 :]]])
    with torch.no_grad():
        each = subject.model.token_logprobs(ids[:, :-1], ids[:, 1:])[0]
    return float(each[len(before) - 1 :].sum())


def test_bits_per_byte_and_perplexities_are_those_of_the_documents(models, write: Write, evaluated) -> None:
    texts = ["the whale", "naïve: the sea, the sea and the ship", "x"]
    subject = Subject.load(models[0], device="cpu")
    nats = -np.array([logprob(subject, "", text) for text in texts])
    sizes = np.array([len(text.encode()) for text in texts])
    tokens = sum(len(subject.tokenizer.encode(text)) for text in texts)
    (found,) = evaluated(models[0], "--text", write("t.jsonl", [{"text": text} for text in texts]))["models"]
    (text,) = found["evaluations"]
    assert (text["items"], text["bytes"], text["tokens"], text["windows"]) == (3, sizes.sum(), tokens, 3)
    measures = {name: one["value"] for name, one in text["measures"].items()}
    assert measures == {
        "bits_per_byte": pytest.approx(nats.sum() / sizes.sum() / math.log(2), rel=1e-5),
        "byte_perplexity": pytest.approx(math.exp(nats.sum() / sizes.sum()), rel=1e-5),
        "token_perplexity": pytest.approx(math.exp(nats.sum() / tokens), rel=1e-5),
    }
    assert text["measures"]["bits_per_byte"]["standard_error"] > 0


def test_the_validation_part_is_what_training_keeps_aside(models, write: Write, evaluated, tmp_path: Path) -> None:
    from anarcho_tokenize import DataConfig, Tokenizer, TokenShards, prepare_shards

    source = write("t.jsonl", [{"text": f"the whale {number}"} for number in range(200)])
    config = DataConfig(source=str(source), validation_fraction=0.2, num_workers=0)
    prepare_shards(config, Tokenizer.load(models[0]), tmp_path / "data")
    kept = TokenShards.open(tmp_path / "data" / "validation")
    arguments = ("--text", source, "--part", "validation", "--validation-fraction", 0.2)
    (text,) = evaluated(models[0], *arguments)["models"][0]["evaluations"]
    assert text["bytes"] == kept.num_bytes > 0
    assert text["tokens"] == kept.num_tokens - text["items"], "the end of a text is not predicted"
    (whole,) = evaluated(models[0], "--text", source)["models"][0]["evaluations"]
    assert whole["items"] == 200


def test_embedded_text_is_the_default_and_its_validation_part_is_read(models, evaluated) -> None:
    (text,) = evaluated(models[0], "--limit", 1)["models"][0]["evaluations"]
    assert (text["name"], text["items"], text["documents_in_windows"]) == ("embedded (validation)", 1, 1)
    assert text["measures"]["bits_per_byte"]["standard_error"] is None


def test_accuracies_are_those_of_log_probabilities_by_hand(models, write: Write) -> None:
    for directory in models:
        subject = Subject.load(directory, device="cpu")
        asked = [
            ("Question: Where is the whale?\nAnswer:", [" the sea", " the ship, the ship"], 0),
            ("The ship", [" and the sea", " whale"], 1),
            ("Question: Which?\nAnswer:", [" sea", " ship", " the"], 2),
            ("the", [" whale", " ship and sea"], 1),
        ]
        right, right_per_byte = 0, 0
        choices = [
            list(row["choices"]["text"]) if isinstance(row["choices"], dict) else row["choices"] for row in QUESTIONS
        ]
        for (prompt, continuations, answer), texts in zip(asked, choices, strict=True):
            values = [logprob(subject, prompt, continuation) for continuation in continuations]
            right += int(np.argmax(values) == answer)
            normed = [value / len(text.encode()) for value, text in zip(values, texts, strict=True)]
            right_per_byte += int(np.argmax(normed) == answer)
        found = evaluate_task(subject, read_task(write("q.jsonl", QUESTIONS)))
        assert found.estimates["accuracy"].value == right / 4
        assert found.estimates["accuracy_per_byte"].value == right_per_byte / 4


def test_a_long_choice_can_win_by_its_mean_alone(models, write: Write) -> None:
    # Every token of an untrained model without blocks is about as likely, so that fewer tokens are likelier.
    subject = Subject.load(models[0], device="cpu")
    with torch.no_grad():
        subject.model.model.embed_tokens.weight.zero_()
    choices = ["z", "the sea and the whale"]
    rows = [{"prompt": "the", "choices": choices, "answer": 1}, {"prompt": "the", "choices": choices, "answer": 0}]
    found = evaluate_task(subject, read_task(write("q.jsonl", rows[:1])))
    assert {name: one.value for name, one in found.estimates.items()} == {"accuracy": 0, "accuracy_per_byte": 1}
    found = evaluate_task(subject, read_task(write("q.jsonl", rows)))
    assert found.estimates["accuracy"].standard_error == pytest.approx(0.5)


def test_shots_are_shown_and_not_scored(models, write: Write) -> None:
    subject = Subject.load(models[0], device="cpu")
    task = read_task(write("q.jsonl", QUESTIONS), shots=2)
    assert (len(task.shots), len(task.items)) == (2, 2)
    shown_before = "Question: Where is the whale?\nAnswer: the sea\n\nThe ship whale\n\n"
    values = [logprob(subject, shown_before + "the", end) for end in (" whale", " ship and sea")]
    third = [logprob(subject, shown_before + "Question: Which?\nAnswer:", end) for end in (" sea", " ship", " the")]
    expected = (int(np.argmax(values) == 1) + int(np.argmax(third) == 2)) / 2
    assert evaluate_task(subject, task).estimates["accuracy"].value == expected


def test_last_words_count_if_greedy_and_their_perplexity_is_by_word(models, write: Write) -> None:
    subject = Subject.load(models[0], device="cpu")
    found = evaluate_task(subject, read_task(write("w.jsonl", WORDS)))
    nats = [-logprob(subject, "the whale and the", " sea"), -logprob(subject, "the sea and the", " ship")]
    assert found.estimates["word_perplexity"].value == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    (the,) = subject.tokenizer.encode("sea the")[len(subject.tokenizer.encode("sea")) :]
    with torch.no_grad():
        weight = subject.model.model.embed_tokens.weight.zero_()
        weight[:, 0], weight[the, 0] = -1, -2  # the likeliest, whatever went before
    found = evaluate_task(subject, read_task(write("w.jsonl", [{"text": "sea the"}, {"text": "sea ship"}])))
    assert found.estimates["accuracy"].value == 0.5


@pytest.mark.parametrize("chat", [False, True])
def test_preferences_count_the_likelier_answer(chat: bool, models, write: Write) -> None:
    from anarcho_tokenize import encode_preference

    subject = Subject.load(models[0], device="cpu")
    task = read_task(write("p.jsonl", PAIRS))
    right, right_per_byte = 0, 0
    for row, pair in zip(PAIRS, task.items, strict=True):
        answers = [row["chosen"], row["rejected"]]
        if chat:
            values = []
            for ids, mask in encode_preference(subject.tokenizer, pair):
                tokens = torch.from_numpy(ids.astype(np.int64))[None]
                with torch.no_grad():
                    each = subject.model.token_logprobs(tokens[:, :-1], tokens[:, 1:])[0]
                values.append(float((each * torch.from_numpy(mask[1:])).sum()))
        else:
            values = [logprob(subject, row["prompt"], f" {answer}") for answer in answers]
        right += values[0] > values[1]
        right_per_byte += values[0] / len(answers[0]) > values[1] / len(answers[1])
    found = evaluate_task(subject, task, as_chat=chat)
    assert found.estimates["accuracy"].value == right / 2
    assert found.estimates["accuracy_per_byte"].value == right_per_byte / 2


def test_compared_models_have_differences_with_paired_errors(models, write: Write, evaluated, anarcho) -> None:
    source = write("t.jsonl", [{"text": f"the whale and {number}"} for number in range(9)])
    arguments = (*models, "--text", source, "--task", write("q.jsonl", QUESTIONS), "--compare")
    found = evaluated(*arguments)
    values = [{one["name"]: one["measures"] for one in model["evaluations"]} for model in found["models"]]
    assert len(found["differences"]) == 5
    for difference in found["differences"]:
        first, second = (one[difference["name"]][difference["measure"]] for one in values)
        assert difference["value"] == pytest.approx(second["value"] - first["value"])
        unpaired = math.hypot(first["standard_error"], second["standard_error"])
        assert 0 <= difference["standard_error"] <= 2**0.5 * unpaired
    table = anarcho("eval", *arguments, "--device", "cpu").stdout
    assert "B - A" in table
    assert "bits_per_byte" in table
    assert str(models[1]) in table


def test_the_table_names_models_texts_and_errors(models, write: Write, anarcho) -> None:
    result = anarcho("eval", models[0], "--task", write("q.jsonl", QUESTIONS), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert str(models[0]) in result.stdout
    assert "accuracy_per_byte" in result.stdout
    assert "±" in result.stdout


def test_numbers_are_shown_with_as_many_digits_as_their_error() -> None:
    assert shown(mean([1.0, 0.0]), name="accuracy") == "50.00 ± 50.00 %"
    assert shown(mean([1.23456]), name="bits_per_byte") == "1.2346"
    assert shown(mean([1.5, 2.5]), name="bits_per_byte", signed=True) == "+2.0000 ± 0.5000"
    assert shown(mean([123.456, 123.456]), name="token_perplexity") == "123.46 ± 0.00"


def test_a_packed_file_is_the_same_task(write: Write, tmp_path: Path) -> None:
    plain = write("q.jsonl", QUESTIONS)
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_task(packed).items == read_task(plain).items
    assert read_task(packed).sha256 == read_task(plain).sha256
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read_task(packed)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "holds 0 rows"),
        ([{"choices": ["a", "b"], "question": "q", "answer": 2}], "q.jsonl:1 has the answer 2"),
        ([{"choices": ["a", "b"], "question": "q", "answer": "C"}], "one of A, B"),
        ([{"choices": ["a", "b"], "question": "q"}], "has no answer"),
        ([{"choices": ["a"], "question": "q", "answer": 0}], "at least two"),
        ([{"choices": ["a", ""], "question": "q", "answer": 0}], "empty choice"),
        ([{"choices": ["a", "b"], "answer": 0}], "for nothing"),
        ([{"chosen": "a"}], "is no preference"),
        ([{"text": "word"}], "one word"),
        ([{"text": "two words"}, {"chosen": "a", "rejected": "b", "prompt": "c"}], "q.jsonl:2 is a row of the kind"),
        ([{"other": 1}], "has the keys other"),
        ([["a"]], "expected an object"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_by_place(rows, part: str, models, write: Write, refused) -> None:
    assert part in refused("eval", models[0], "--task", write("q.jsonl", rows), "--device", "cpu")


def test_what_makes_no_sense_is_refused(models, write: Write, refused, tmp_path: Path) -> None:
    words, pairs = write("w.jsonl", WORDS), write("p.jsonl", PAIRS)
    assert "at least two" in refused("eval", models[0], "--compare")
    assert "given twice" in refused("eval", models[0], models[0])
    assert "absent" in refused("eval", models[0], "--task", tmp_path / "absent")
    assert "more than the 2" in refused("eval", models[0], "--task", words, "--shots", 2)
    assert "--shots" in refused("eval", models[0], "--task", pairs, "--shots", 1)
    assert "absent" in refused("eval", models[0], "--text", tmp_path / "absent")
    text = write("t.jsonl", [{"text": "the whale"}])
    assert "--part all" in refused("eval", models[0], "--text", text, "--part", "validation", "--device", "cpu")
    bad = tmp_path / "b.jsonl"
    bad.write_bytes(b"\xff\n")
    assert "b.jsonl:1 is no JSON" in refused("eval", models[0], "--task", bad)
