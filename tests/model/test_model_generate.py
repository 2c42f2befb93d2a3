"""Generation: cached equals uncached, filters are those of Transformers in its order, seeds repeat, texts end where they should."""

from __future__ import annotations

import pytest
import torch
from anarcho_model.errors import NotFiniteError
from anarcho_model.generate.drafting import PromptLookup
from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.generate.torch import (
    draw_tokens,
    generate,
    generate_batch,
    next_token_probabilities,
    seeded_generator,
)
from anarcho_model.torch import ContextError, KVCache
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LEAST = [
    *({"temperature": value} for value in (1e-30, 2.0**-126, 1e-45, 1e-300, 5e-324)),
    *({"top_p": value} for value in (1e-30, 1e-50, 5e-324)),
    {"min_p": 1.0},
    {"top_k": 1},
    {"temperature": 1e-300, "top_k": 2, "top_p": 1e-50, "min_p": 1e-300},
]
"""Settings that leave the likeliest token alone, some of which float32 cannot hold."""
PROMPTS = [[5, 9, 1], [3], [8, 8, 7, 6, 5, 4, 3, 2, 60]]


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * 23, [10, 1, 1, 11], [22, 1]])
def test_reading_through_a_cache_gives_the_logits_of_reading_at_once(model, steps):
    tokens = torch.randint(0, 67, (2, 23), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model, batch=2, capacity=30)
    parts = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=0, atol=5e-5)
    assert cache.lengths.tolist() == [23, 23]


@torch.no_grad()
def test_greedy_text_is_what_the_uncached_model_finds_likeliest(model):
    text = list(PROMPTS[0])
    for _ in range(12):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    found = list(generate(model, PROMPTS[0], config=SamplingConfig(max_new_tokens=12, temperature=0.0)))
    assert found == text[3:]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_of_prompts_of_any_lengths_gives_what_each_gives_alone(model, temperature):
    config = SamplingConfig(max_new_tokens=50, temperature=temperature, top_k=20, seed=11)
    together = generate_batch(model, PROMPTS, config=config)
    for row, prompt in enumerate(PROMPTS):
        alone = SamplingConfig(max_new_tokens=50, temperature=temperature, top_k=20, seed=11 + row)
        assert together[row] == list(generate(model, prompt, config=alone))
        assert len(prompt) + len(together[row]) == 40
    assert generate_batch(model, [], config=config) == []


def test_a_row_that_ends_early_leaves_the_others_as_they_are(small_model):
    config = SamplingConfig(max_new_tokens=25, seed=3)
    free = generate_batch(small_model, PROMPTS, config=config)
    stop = free[1][2]
    stopped = generate_batch(
        small_model, PROMPTS, config=SamplingConfig(max_new_tokens=25, seed=3, stop_token_ids=(stop,))
    )
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert stopped == expected
    assert len({len(row) for row in stopped}) > 1


def test_a_full_context_in_one_row_does_not_stop_the_others(small_model):
    full = [1] * 40
    rows = generate_batch(small_model, [full, PROMPTS[0]], config=SamplingConfig(max_new_tokens=99, seed=0))
    assert (len(rows[0]), len(rows[1])) == (0, 37)
    assert rows[1] == list(generate(small_model, PROMPTS[0], config=SamplingConfig(max_new_tokens=99, seed=1)))


def test_the_same_seed_gives_the_same_text_and_leaves_the_global_generator_alone(small_model):
    config = SamplingConfig(max_new_tokens=20, seed=5)
    state = torch.get_rng_state()
    first = list(generate(small_model, [4], config=config))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert list(generate(small_model, [4], config=config)) == first
    others = [
        list(generate(small_model, [4], config=SamplingConfig(max_new_tokens=20, seed=seed))) for seed in (6, None)
    ]
    assert first not in others


def test_text_ends_at_a_stop_id_which_is_not_part_of_it(small_model):
    free = list(generate(small_model, [4], config=SamplingConfig(max_new_tokens=20, seed=5)))
    stop = free[6]
    config = SamplingConfig(max_new_tokens=20, seed=5, stop_token_ids=(66, stop))
    found = list(generate(small_model, [4], config=config))
    assert found == free[: min(free.index(token) for token in (66, stop) if token in free)]


def test_text_ends_when_prompt_and_text_fill_the_context(small_model):
    config = SamplingConfig(max_new_tokens=1000, seed=0)
    assert [len(list(generate(small_model, [1] * length, config=config))) for length in (1, 39, 40)] == [39, 1, 0]
    with pytest.raises(ContextError, match="prompt has 41 tokens, but the model's context is 40"):
        generate(small_model, [1] * 41, config=config)


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "prompt is empty"), ([1, 67], "the id 67, expected ids from 0 to 66")]
)
def test_a_prompt_that_cannot_be_read_is_refused_at_the_call(small_model, prompt, message):
    with pytest.raises(SamplingError, match=message):
        generate(small_model, prompt, config=SamplingConfig())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_the_filters_are_those_of_transformers_in_its_order(seed, temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(torch.zeros(2, 1, dtype=torch.long), logits.clone()).softmax(-1)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(next_token_probabilities(logits, config=config), expected, rtol=1e-4, atol=1e-6)


def test_top_p_counts_what_top_k_has_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = next_token_probabilities(logits, config=SamplingConfig(top_k=2, top_p=0.55))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, 0.0]))  # 0.4 of all, but 0.57 of the two


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("max_new_tokens", -1),
        ("seed", -1),
        ("stop_token_ids", (-2,)),
    ],
)
def test_settings_out_of_range_are_refused_by_their_key(key, value):
    with pytest.raises(SamplingError, match=rf"^sample\.{key} is .*, expected"):
        SamplingConfig(**{key: value})


@pytest.mark.parametrize("settings", LEAST, ids=str)
def test_the_likeliest_token_stays_however_little_is_kept(settings):
    logits = 3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    found = next_token_probabilities(logits, config=SamplingConfig(**settings))
    assert torch.equal(found, torch.nn.functional.one_hot(logits.argmax(-1), 30).float())


def test_a_temperature_that_float32_cannot_hold_draws_as_temperature_0_does():
    tied = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    for temperature in (1e-300, 2.0**-127, 0.0):
        config = SamplingConfig(temperature=temperature, min_p=0.5)
        assert {draw_tokens(tied, configs=[config], generators=[seeded_generator(n)])[0] for n in range(9)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_in_place_of_a_token(temperature, spoilt):
    logits = torch.zeros(2, 9)
    logits[1, 4] = spoilt
    config = SamplingConfig(temperature=temperature, top_k=5, top_p=0.9, min_p=0.1)
    assert draw_tokens(logits[:1], configs=[config], generators=[seeded_generator(0)])[0] < 9
    with pytest.raises(NotFiniteError, match=r"logits are NaN or infinite, expected finite .* checkpoint"):
        draw_tokens(logits, configs=[config] * 2, generators=[seeded_generator(0)] * 2)


def test_tokens_that_a_model_rules_out_are_no_error():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for temperature in (0.0, 1.0):
        config = SamplingConfig(temperature=temperature, top_p=0.9)
        assert draw_tokens(logits, configs=[config], generators=[seeded_generator(0)]) == [1]


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_raises_when_its_text_is_asked_for(build, temperature):
    model, config = build(), SamplingConfig(max_new_tokens=5, temperature=temperature)
    model.model.norm.weight.fill_(torch.nan)
    text = generate(model, PROMPTS[0], config=config)
    with pytest.raises(NotFiniteError):
        next(text)
    with pytest.raises(NotFiniteError):
        next(generate(model, PROMPTS[0], config=config, draft=PromptLookup()))
    with pytest.raises(NotFiniteError):
        generate_batch(model, PROMPTS, config=config)
