"""Log-probabilities, windows and statistics behind `anarcho eval`: equal to direct computations, whatever the batching."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anarcho_cli.evaluation.encoding import encode_answer, encode_continuation, encode_document
from anarcho_cli.evaluation.errors import EvaluationError
from anarcho_cli.evaluation.scoring import Request, Scorer, windows_of
from anarcho_cli.evaluation.statistics import exponential, mean, ratio
from anarcho_cli.evaluation.subject import Subject
from anarcho_model import ModelConfig
from anarcho_model.config import InitConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import save_pretrained
from anarcho_tokenize import Message, TokenizerConfig, encode_conversation, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

CONTEXT = 24


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizer, whose blocks do something."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    tokenizer.save(path)
    network = GPT(ModelConfig(vocab_size=285, context_length=CONTEXT, num_layers=2, dim=32, num_heads=2))
    network.init_weights(seed=0, init=InitConfig(embedding_std=0.5, zero_residual_outputs=False))
    save_pretrained(network, path, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    return path


@pytest.fixture(scope="module")
def subject(directory: Path) -> Subject:
    return Subject.load(directory, device="cpu")


def random_request(generator: np.random.Generator) -> Request:
    length = int(generator.integers(2, 4 * CONTEXT))
    tokens = generator.integers(0, 285, length).astype(np.int32)
    return Request(tokens=tokens, first_target=int(generator.integers(1, length)))


def widened(model: GPT, context_length: int) -> GPT:
    """The model with a longer context."""
    wide = GPT(dataclasses.replace(model.config, context_length=context_length))
    wide.load_state_dict(model.state_dict())
    return wide


def test_log_probabilities_are_those_of_transformers(directory: Path, subject: Subject) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    request = encode_continuation(subject.tokenizer, "the whale", " and the sea")
    ids = torch.from_numpy(request.tokens.astype(np.int64))[None]
    assert len(request.tokens) <= CONTEXT
    with torch.no_grad():
        logprobs = reference(ids).logits[0, :-1].log_softmax(-1)
    each = logprobs.gather(1, ids[0, 1:, None])[:, 0][request.first_target - 1 :]
    (score,) = subject.scorer.score([request])
    assert score.logprob == pytest.approx(float(each.sum()), rel=1e-5)
    assert score.num_tokens == len(each) > 1
    assert (score.num_windows, score.is_cut) == (1, False)


@pytest.mark.parametrize("batch_tokens", [1, 50, 10**6])
def test_scores_do_not_depend_on_the_batching(batch_tokens: int, subject: Subject) -> None:
    generator = np.random.default_rng(0)
    requests = [random_request(generator) for _ in range(40)]
    alone = [next(subject.scorer.score([request])) for request in requests]
    together = list(Scorer(subject.model, batch_tokens=batch_tokens).score(requests))
    assert [score.logprob for score in together] == pytest.approx([score.logprob for score in alone], rel=1e-5)
    assert [(one.num_tokens, one.num_windows) for one in together] == [
        (one.num_tokens, one.num_windows) for one in alone
    ]


def test_requests_are_scored_in_order_across_blocks(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    requests = [random_request(generator) for _ in range(20)]
    whole = [score.logprob for score in subject.scorer.score(requests)]
    monkeypatch.setattr("anarcho_cli.evaluation.scoring._BLOCK_TOKENS", 100)
    assert [score.logprob for score in subject.scorer.score(requests)] == pytest.approx(whole, rel=1e-5)


@given(num_tokens=st.integers(2, 200), context=st.integers(1, 40), data=st.data())
def test_each_target_is_predicted_once_within_the_context(num_tokens: int, context: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, num_tokens - 1))
    windows = list(windows_of(num_tokens, first_target=first, context_length=context))
    assert [place for w in windows for place in range(w.start, w.stop)] == list(range(first, num_tokens))
    for w in windows:
        assert 0 <= w.begin < w.start
        assert w.stop - 1 - w.begin <= context
    last = windows[-1]
    assert last.begin == max(0, num_tokens - 1 - context), "the last window does not use the whole context"


def test_a_text_longer_than_the_context_is_the_sum_of_its_windows(subject: Subject) -> None:
    request = random_request(np.random.default_rng(2))
    request = Request(tokens=np.resize(request.tokens, 2 * CONTEXT + 5), first_target=1)
    (score,) = subject.scorer.score([request])
    assert (score.num_windows, score.is_cut, score.num_tokens) == (3, True, 2 * CONTEXT + 4)
    tokens = torch.from_numpy(request.tokens.astype(np.int64))
    total = 0.0
    for begin, start, stop in ((0, 1, 25), (24, 25, 49), (28, 49, 53)):
        inputs, targets = tokens[begin : stop - 1][None], tokens[begin + 1 : stop][None]
        with torch.no_grad():
            total += float(subject.model.token_logprobs(inputs, targets)[0, start - begin - 1 :].sum())
    assert score.logprob == pytest.approx(total, rel=1e-5)


def test_greedy_means_that_every_target_is_the_likeliest(subject: Subject) -> None:
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_model.generate.torch import generate

    prompt = [subject.tokenizer.eot_id, *subject.tokenizer.encode("the")]
    written = list(generate(subject.model, prompt, config=SamplingConfig(temperature=0, max_new_tokens=5)))
    greedy = np.array([*prompt, *written], dtype=np.int32)
    other = greedy.copy()
    other[-1] = (other[-1] + 1) % 285
    requests = [Request(tokens=tokens, first_target=len(prompt)) for tokens in (greedy, other)]
    assert [score.is_greedy for score in subject.scorer.score(requests)] == [True, False]


def test_a_document_follows_end_of_text_and_all_its_tokens_count(subject: Subject) -> None:
    request = encode_document(subject.tokenizer, "the whale")
    assert request.tokens.tolist() == [subject.tokenizer.eot_id, *subject.tokenizer.encode("the whale")]
    assert request.num_targets == len(subject.tokenizer.encode("the whale"))


@pytest.mark.parametrize(
    ("context", "continuation"), [("the", " sea"), ("the ", "sea"), ("the wh", "ale"), ("", "sea")]
)
def test_context_and_continuation_are_encoded_as_one_text(context: str, continuation: str, subject: Subject) -> None:
    request = encode_continuation(subject.tokenizer, context, continuation)
    assert request.tokens.tolist()[1:] == subject.tokenizer.encode(context + continuation)
    text = subject.tokenizer.decode(request.tokens[request.first_target :].tolist())
    assert text.endswith(continuation), "a part of the continuation is not predicted"


def test_a_continuation_without_tokens_is_refused(subject: Subject) -> None:
    with pytest.raises(EvaluationError, match="adds no token"):
        encode_continuation(subject.tokenizer, "the sea", "")


@pytest.mark.parametrize("turns", [1, 2])
def test_an_answer_counts_the_tokens_that_training_counts(turns: int, subject: Subject) -> None:
    prompt = [Message("user", "the ship"), Message("assistant", "the whale"), Message("user", "and")]
    answer = [Message("assistant", "the sea"), Message("user", "the"), Message("assistant", "ship")][: 2 * turns - 1]
    ids, mask = encode_conversation(subject.tokenizer, [*prompt, *answer])
    mask[: len(encode_conversation(subject.tokenizer, prompt)[0])] = 0
    request = encode_answer(subject.tokenizer, prompt, answer)
    tokens = torch.from_numpy(ids[: len(request.tokens)].astype(np.int64))
    assert request.tokens.tolist() == tokens.tolist()
    assert request.num_targets == mask.sum()
    assert len(tokens) == np.flatnonzero(mask)[-1] + 1, "tokens behind the last target are read for nothing"
    wide = widened(subject.model, len(tokens))
    with torch.no_grad():
        each = wide.token_logprobs(tokens[None, :-1], tokens[None, 1:])[0].numpy()
    (score,) = Scorer(wide).score([request])
    assert score.logprob == pytest.approx(float((each * mask[1 : len(tokens)]).sum()), rel=1e-5)
    assert score.num_tokens == mask.sum()
    (narrow,) = subject.scorer.score([request])
    assert narrow.num_tokens == mask.sum(), "a window loses targets"


def test_an_id_that_the_model_lacks_is_refused(subject: Subject) -> None:
    with pytest.raises(EvaluationError, match="id 285"):
        list(subject.scorer.score([Request(tokens=np.array([1, 285], dtype=np.int32), first_target=1)]))


def test_the_standard_error_of_an_accuracy_is_the_binomial_one() -> None:
    estimate = mean([1.0] * 30 + [0.0] * 10)
    assert estimate.value == 0.75
    assert estimate.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert mean([1.0]).standard_error is None


def test_the_standard_error_of_a_ratio_is_its_spread_over_samples_of_documents() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 2000, (3000, 50)).astype(float)
    bits = sizes * generator.normal(1.5, 0.3, sizes.shape)
    estimates = [ratio(one, size) for one, size in zip(bits, sizes, strict=True)]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.05)
    perplexities = [exponential(estimate) for estimate in estimates]
    spread = np.std([perplexity.value for perplexity in perplexities])
    assert np.mean([perplexity.standard_error for perplexity in perplexities]) == pytest.approx(spread, rel=0.05)


def test_a_paired_difference_forgets_what_both_models_share() -> None:
    generator = np.random.default_rng(0)
    hardness = generator.normal(2.0, 1.0, 400)
    one, other = mean(hardness.tolist()), mean((hardness - 0.1 + generator.normal(0, 0.01, 400)).tolist())
    difference = other.minus(one)
    assert difference.value == pytest.approx(-0.1, abs=0.005)
    assert difference.standard_error == pytest.approx(0.01 / 20, rel=0.2)
    assert one.minus(one).standard_error == 0
    with pytest.raises(ValueError, match="same items"):
        one.minus(mean([1.0, 2.0]))
