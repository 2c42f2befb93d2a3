"""The adapter for lm-evaluation-harness, where that is installed."""

from __future__ import annotations

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
    # Before an empty context, both put the end-of-text token.
    pairs = requests("loglikelihood", ("", "the whale"), ("", "naïve"))
    for one, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        assert one[1] == other[1]


def test_writing_ends_before_the_first_of_the_ends(directory: Path) -> None:
    model = HarnessModel.load(directory)
    (whole,) = model.generate_until(requests("generate_until", ("the", {"until": [], "max_gen_toks": 12})))
    assert len(whole) > 4
    ends = [whole[4:6], whole[2:4]]
    (cut,) = model.generate_until(requests("generate_until", ("the", {"until": ends, "max_gen_toks": 12})))
    assert cut == whole[: min(whole.find(end) for end in ends)]
