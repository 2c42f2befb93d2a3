"""Generation with MLX: the same text as with PyTorch from the same weights and seed, whatever else is read or drawn."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from anarcho_model.generate import torch as torch_side
from anarcho_model.generate.drafting import PromptLookup
from anarcho_model.generate.draws import seeded_generator
from anarcho_model.generate.engine.torch import Engine as TorchEngine
from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.weights import load_pretrained as load_torch
from anarcho_model.weights import save_pretrained

mx = pytest.importorskip("mlx.core")

from anarcho_model.errors import ContextError, NotFiniteError  # noqa: E402
from anarcho_model.generate import mlx as mlx_side  # noqa: E402
from anarcho_model.generate.drafted.mlx import DraftModel  # noqa: E402
from anarcho_model.generate.engine.mlx import Engine  # noqa: E402
from anarcho_model.generate.stepping.mlx import Stepper  # noqa: E402
from anarcho_model.weights_mlx import load_pretrained  # noqa: E402

PROMPTS = [[5, 9, 1], [3], [8, 8, 7, 6, 5, 4, 3, 2, 60]]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)
SAMPLED = SamplingConfig(max_new_tokens=20, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=11)


def ids(request) -> list[int]:
    return [new.token for new in request.tokens]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_pretrained(model, directory, eos_token_id=7, pad_token_id=None)
    return directory


@pytest.fixture(scope="module")
def both(saved: Path):
    """The same weights on both sides, of every variant."""
    return load_torch(saved), load_pretrained(saved)


@pytest.fixture(scope="module")
def small(small_model, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("small")
    save_pretrained(small_model, directory, eos_token_id=7, pad_token_id=None)
    return load_pretrained(directory)


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_random_numbers_are_those_of_pytorch(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    expected = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(700)]
    draws = seeded_generator(seed)
    assert [draws.next() for _ in range(700)] == expected


def test_numbers_without_a_seed_cannot_be_repeated_and_rows_have_their_own():
    assert seeded_generator(None).next() != seeded_generator(None).next()
    assert seeded_generator(4, row=2).next() == seeded_generator(6).next() != seeded_generator(4).next()


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 4}, {"top_k": 99}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}],
)
def test_filtered_probabilities_are_those_of_pytorch(filters):
    logits = 3 * torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    config = SamplingConfig(temperature=0.7, **filters)
    expected = torch_side.next_token_probabilities(logits, config=config).numpy()
    found = np.array(mlx_side.next_token_probabilities(mx.array(logits.numpy()), config=config))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert ((found == 0) == (expected == 0)).all()


def test_draws_of_mixed_settings_are_those_of_pytorch():
    logits = 2 * torch.randn(40, 50, generator=torch.Generator().manual_seed(5))
    settings = [SamplingConfig(temperature=0.0), SAMPLED, SamplingConfig(temperature=1.5)]
    configs = [settings[row % 3] for row in range(40)]
    found = mlx_side.draw_tokens(
        mx.array(logits.numpy()), configs=configs, generators=[seeded_generator(row) for row in range(40)]
    )
    assert found == torch_side.draw_tokens(
        logits, configs=configs, generators=[seeded_generator(row) for row in range(40)]
    )


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_of_prompts_of_unequal_lengths_are_those_of_pytorch(both, config):
    torch_model, mlx_model = both
    expected = torch_side.generate_batch(torch_model, PROMPTS, config=config)
    assert mlx_side.generate_batch(mlx_model, PROMPTS, config=config) == expected
    for row, prompt in enumerate(PROMPTS):
        seeded = config if config.seed is None else dataclasses.replace(config, seed=config.seed + row)
        assert list(mlx_side.generate(mlx_model, prompt, config=seeded)) == expected[row]
    assert max(map(len, expected)) >= 12


def test_a_text_ends_at_a_stop_id_at_the_most_tokens_and_with_the_context(small):
    endless = SamplingConfig(max_new_tokens=99, seed=3)
    text = list(mlx_side.generate(small, [1], config=endless))
    assert len(text) == 39, "prompt and text fill the context"
    stop = next(n for n, token in enumerate(text) if token not in text[:n] and n > 2)
    stopped = dataclasses.replace(endless, stop_token_ids=(text[stop],))
    assert list(mlx_side.generate(small, [1], config=stopped)) == text[:stop]
    assert mlx_side.generate_batch(small, [[1], [1]], config=stopped)[0] == text[:stop]
    none = dataclasses.replace(GREEDY, max_new_tokens=0)
    assert list(mlx_side.generate(small, [1], config=none)) == []
    assert mlx_side.generate_batch(small, [], config=GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [([], SamplingError, "prompt is empty"), ([67], SamplingError, "the id 67"), ([1] * 41, ContextError, "41 tokens")],
)
def test_a_prompt_that_cannot_be_read_is_refused_at_the_call(small, prompt, error, message):
    with pytest.raises(error, match=message):
        mlx_side.generate(small, prompt, config=GREEDY)


def test_a_prompt_read_in_chunks_gives_the_logits_of_one_read_whole(both, monkeypatch):
    _, model = both
    parts = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 8, 8, 8]]
    whole = Stepper(model, rows=3, capacity=20).read(parts, rows=[2, 0, 1], lengths=[0, 0, 0])
    monkeypatch.setattr("anarcho_model.generate.stepping.mlx.CHUNK_TOKENS", 3)
    stepper = Stepper(model, rows=3, capacity=20)
    found = stepper.read(parts, rows=[2, 0, 1], lengths=[0, 0, 0])
    np.testing.assert_allclose(np.array(found), np.array(whole), rtol=0, atol=5e-5)
    # Row 2 holds the first prompt, row 0 the second, row 1 the third; row 0 rests, then all but row 1.
    after = {row: model(mx.array([[*part, 11, 12]]))[0, -2:] for row, part in zip([2, 0, 1], parts, strict=True)}
    first = stepper.step([None, 11, 11], lengths=[1, 4, 7])
    np.testing.assert_allclose(np.array(first), np.array([after[1][0], after[2][0]]), rtol=0, atol=5e-5)
    second = stepper.step([None, 12, None], lengths=[1, 5, 8])
    np.testing.assert_allclose(np.array(second), np.array([after[1][1]]), rtol=0, atol=5e-5)


def test_freed_memory_is_let_go_of_while_a_text_grows(small, monkeypatch):
    cleared = []
    monkeypatch.setattr("anarcho_model.generate.stepping.mlx.CLEARED_STEPS", 5)
    monkeypatch.setattr("anarcho_model.generate.stepping.mlx.mx.clear_cache", lambda: cleared.append(None))
    list(mlx_side.generate(small, [1], config=dataclasses.replace(GREEDY, max_new_tokens=20)))
    assert len(cleared) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_that_come_and_go_get_what_each_gets_alone_with_pytorch(both, temperature):
    torch_model, mlx_model = both
    config = SamplingConfig(max_new_tokens=20, temperature=temperature, top_k=20, seed=11, stop_token_ids=(7,))
    engine = Engine(mlx_model, slots=2, prefill_tokens=4)
    requests = []
    for prompt in [*PROMPTS, [5, 9, 1, 4], [5, 9]]:
        requests.append(engine.submit(prompt, config=config, top_logprobs=3))
        engine.step()
    requests[1].cancel()
    engine.run()
    for request in requests:
        alone = list(torch_side.generate(torch_model, request.prompt, config=config))
        found = ids(request)
        assert found == alone[: len(found)]
        assert request.ended_by == "cancelled" or len(found) == len(alone)
    assert any(request.reused_tokens for request in requests)


def test_logprobs_of_an_engine_are_those_of_pytorch(both):
    found, expected = (
        kind(model).submit(PROMPTS[0], config=SAMPLED, top_logprobs=4)
        for kind, model in zip((Engine, TorchEngine), reversed(both), strict=True)
    )
    for new, other in zip(found, expected, strict=True):
        assert new.token == other.token
        assert new.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in new.top] == [token for token, _ in other.top]
        assert [value for _, value in new.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


@pytest.mark.parametrize("config", [GREEDY, dataclasses.replace(GREEDY, temperature=0.3, seed=1)])
def test_guesses_change_no_text(small, config):
    alone = list(mlx_side.generate(small, PROMPTS[2], config=config))
    for draft in (PromptLookup(shortest=1), DraftModel(small, guesses=3)):
        assert list(mlx_side.generate(small, PROMPTS[2], config=config, draft=draft)) == alone


def test_a_quantised_cache_answers_nearly_alike(build, tmp_path):
    save_pretrained(build(dim=64, num_heads=2), tmp_path, eos_token_id=7, pad_token_id=None)
    model = load_pretrained(tmp_path)
    whole, quantised = (Stepper(model, rows=1, capacity=30, kv_bits=bits) for bits in (None, 8))
    logits = [stepper.read([PROMPTS[2]], rows=[0], lengths=[0]) for stepper in (whole, quantised)]
    logits = [stepper.step([4], lengths=[9]) for stepper in (whole, quantised)]
    difference = float(mx.abs(logits[0] - logits[1]).max())
    assert 0 < difference < 0.1 * float(mx.abs(logits[0]).max())
    assert len(list(mlx_side.generate(model, PROMPTS[0], config=GREEDY, kv_bits=8))) == 12
    engine = Engine(model, slots=2, stepping=partial(Stepper, kv_bits=4))
    requests = [engine.submit(prompt, config=GREEDY) for prompt in PROMPTS]
    engine.run()
    assert [len(request.tokens) for request in requests] == [12, 12, 12]


def test_an_engine_made_in_one_thread_steps_in_another(small):
    import threading

    engine = Engine(small, slots=2)
    requests = [engine.submit(prompt, config=SAMPLED) for prompt in PROMPTS]
    thread = threading.Thread(target=engine.run)
    thread.start()
    thread.join(timeout=60)
    assert [ids(request) for request in requests] == [
        list(mlx_side.generate(small, prompt, config=SAMPLED)) for prompt in PROMPTS
    ]


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": value} for value in (1e-30, 2.0**-126, 1e-45, 1e-300)),
        *({"top_p": value} for value in (1e-30, 1e-50, 5e-324)),
        {"temperature": 1e-300, "top_k": 2, "top_p": 1e-50, "min_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 1},
    ],
    ids=str,
)
def test_the_likeliest_token_stays_however_little_is_kept(settings):
    logits = 3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    found = mlx_side.next_token_probabilities(mx.array(logits.numpy()), config=SamplingConfig(**settings))
    np.testing.assert_array_equal(np.array(found), np.eye(30)[logits.argmax(-1)])


def test_a_temperature_that_float32_cannot_hold_draws_as_temperature_0_does():
    tied, config = mx.array([[0.0, 2.0, 1.0, 2.0]]), SamplingConfig(temperature=1e-300)
    assert {mlx_side.draw_tokens(tied, configs=[config], generators=[seeded_generator(n)])[0] for n in range(9)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_in_place_of_a_token(temperature, spoilt):
    logits = mx.zeros((2, 9))
    logits[1, 4] = spoilt
    config = SamplingConfig(temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
    assert mlx_side.draw_tokens(logits[:1], configs=[config], generators=[seeded_generator(0)])[0] < 9
    with pytest.raises(NotFiniteError, match="logits are NaN or infinite"):
        mlx_side.draw_tokens(logits, configs=[config] * 2, generators=[seeded_generator(0)] * 2)
    ruled_out = mx.array([[-mx.inf, 0.0, -mx.inf]])
    assert mlx_side.draw_tokens(ruled_out, configs=[config], generators=[seeded_generator(0)]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_request_whose_numbers_are_not_finite_fails_alone_and_leaves_nothing_behind(
    build, tmp_path, temperature, bits
):
    save_pretrained(build(dim=64, num_heads=2, tie_embeddings=False), tmp_path, eos_token_id=7, pad_token_id=None)
    model = load_pretrained(tmp_path)
    model.model.embed_tokens.weight[66] = mx.nan
    config = SamplingConfig(max_new_tokens=12, temperature=temperature, seed=3, stop_token_ids=(66,))
    engine = Engine(model, slots=2, stepping=partial(Stepper, kv_bits=bits))
    spoilt = engine.submit([4, 66, 5, 66, 6, 7], config=config, top_logprobs=2)
    others = [engine.submit(prompt, config=config) for prompt in ([7, 8], [4, 1], [2, 3])]
    engine.run()
    assert (spoilt.ended_by, spoilt.tokens) == ("failed", [])
    expected = [list(mlx_side.generate(model, request.prompt, config=config, kv_bits=bits)) for request in others]
    assert [ids(request) for request in others] == expected
    with pytest.raises(NotFiniteError):
        list(mlx_side.generate(model, [66], config=config, kv_bits=bits))
    with pytest.raises(NotFiniteError):
        mlx_side.generate_batch(model, [[1], [66]], config=config, kv_bits=bits)
