"""The adapter for lm-evaluation-harness, where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from anarcho_cli.evaluation.harness import HarnessModel
from anarcho_model import ModelConfig
from anarcho_model.config import InitConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import save_pretrained
from anarcho_tokenize import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizer; context 32."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(path)
    network = GPT(ModelConfig(vocab_size=285, context_length=32, num_layers=1, dim=16, num_heads=2))
    network.init_weights(seed=0, init=InitConfig(embedding_std=0.5, zero_residual_outputs=False))
    save_pretrained(network, path, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return path


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_answers_equal_those_of_the_adapter_for_transformers(directory: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = HarnessModel.load(directory)
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=2)
    texts = requests("loglikelihood_rolling", ("the whale and the sea. " * 20,), ("the ship",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    pairs = [
        ("", "the whale"),
        ("", "naïve"),
        ("the whale and", " the sea"),
        ("the ship. ", "sea"),
        ("a " * 60, "ship"),
    ]
    asked = requests("loglikelihood", *pairs, ("<|user|>the sea<|end|><|assistant|>", "the ship"))
    for one, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1] == other[1]
    settings = {"until": ["ea"], "max_gen_toks": 12}
    written = requests("generate_until", ("the whale", settings), ("the ship and", settings), ("a " * 40, settings))
    assert ours.generate_until(written) == theirs.generate_until(written)
    talk = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "the ship"}]
    assert ours.apply_chat_template(talk[:1]) == theirs.apply_chat_template(talk[:1])
    unfinished = ours.apply_chat_template(talk, add_generation_prompt=False)
    assert unfinished == theirs.apply_chat_template(talk, add_generation_prompt=False)


TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "local_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def test_local_tasks_give_equal_figures_on_the_exported_directory(directory: Path, tmp_path: Path, anarcho) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    exported = anarcho("export", directory, "--to", "hf", "--out", tmp_path / "exported")
    assert exported.exit_code == 0, exported.output
    words = ["the whale", "the sea", "and the ship", "the", "ship and sea", "whale."]
    rows = [
        {"question": f"{words[n % 6]} {words[n % 5]}", "choices": [words[n % 4], words[(n + 1) % 6]], "answer": n % 2}
        for n in range(24)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}}
    for name, task in TASKS.items():
        # JSON is YAML, too.
        whole = {"task": name, "test_split": "test", **data, **task}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(whole))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = HFLM(pretrained=str(tmp_path / "exported"), device="cpu", dtype="float32", batch_size=2)
    found = [
        lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
        for model in (HarnessModel.load(directory), theirs)
    ]
    for name in TASKS:
        for measure, value in found[1][name].items():
            if measure not in ("alias", "name") and not isinstance(value, str):
                assert found[0][name][measure] == pytest.approx(value, rel=1e-5), (name, measure)


def test_writing_ends_before_the_first_of_the_ends(directory: Path) -> None:
    model = HarnessModel.load(directory)
    (whole,) = model.generate_until(requests("generate_until", ("the", {"until": [], "max_gen_toks": 12})))
    assert len(whole) > 4
    ends = [whole[4:6], whole[2:4]]
    (cut,) = model.generate_until(requests("generate_until", ("the", {"until": ends, "max_gen_toks": 12})))
    assert cut == whole[: min(whole.find(end) for end in ends)]
