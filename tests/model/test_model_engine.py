"""Continuous batching: every request gets what it would get alone, whatever joins, leaves, waits or was read before."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from anarcho_model.errors import NotFiniteError
from anarcho_model.generate.engine.torch import Engine, NewToken
from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.generate.torch import generate, next_token_probabilities
from anarcho_model.torch import ContextError, KVCache
from hypothesis import given, settings
from hypothesis import strategies as st

PROMPTS = [[5, 9, 1], [3], [8, 8, 7, 6, 5, 4, 3, 2, 60]]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


def ids(request) -> list[int]:
    return [new.token for new in request.tokens]


@torch.no_grad()
@pytest.mark.parametrize("rows", [[1, 2], [2, 0], [3]])
def test_selected_rows_of_a_cache_are_read_and_written_in_place(model, rows):
    tokens = torch.randint(0, 67, (4, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model, batch=4, capacity=20)
    model(tokens[:, :7], cache=cache)
    untouched = [row for row in range(4) if row not in rows]
    before = [layer.keys[untouched].clone() for layer in cache.layers]
    found = model(tokens[rows, 7:], cache=cache.select(rows))
    torch.testing.assert_close(found, model(tokens[rows])[:, 7:], rtol=0, atol=5e-5)
    assert all(torch.equal(layer.keys[untouched], old) for layer, old in zip(cache.layers, before, strict=True))
    again = cache.select(rows)
    again.lengths += 4
    torch.testing.assert_close(model(tokens[rows, 11:], cache=again), found[:, 4:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_requests_in_every_variant_of_the_model_get_what_each_gets_alone(model, temperature):
    engine = Engine(model, slots=2, prefill_tokens=4)
    config = SamplingConfig(max_new_tokens=50, temperature=temperature, top_k=20, seed=11)
    requests = [engine.submit(prompt, config=config) for prompt in PROMPTS]
    engine.run()
    assert [ids(request) for request in requests] == [
        list(generate(model, prompt, config=config)) for prompt in PROMPTS
    ]
    assert {request.ended_by for request in requests} == {"context"}


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    slots=st.integers(1, 4),
    prefill=st.integers(1, 30),
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=7),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_joining_leaving_and_waiting_in_any_order_changes_no_text(
    small_model, data, slots, prefill, prompts, temperature
):
    # Ids from so few that prompts often begin alike, and read on from what another request has left.
    engine = Engine(small_model, slots=slots, prefill_tokens=prefill)
    requests = []
    for seed, prompt in enumerate(prompts):
        for _ in range(data.draw(st.integers(0, 6), label="steps before")):
            engine.step()
        if requests and data.draw(st.booleans(), label="cancel one"):
            data.draw(st.sampled_from(requests)).cancel()
        longest = data.draw(st.integers(0, 12), label="longest")
        config = SamplingConfig(max_new_tokens=longest, temperature=temperature, seed=seed, stop_token_ids=(7, 9, 11))
        requests.append(engine.submit(prompt, config=config))
    engine.run()
    for request, prompt in zip(requests, prompts, strict=True):
        alone = list(generate(small_model, prompt, config=request.config))
        found = ids(request)
        assert found == alone[: len(found)]
        assert request.ended_by == "cancelled" or len(found) == len(alone)


def test_a_conversation_that_goes_on_reads_only_what_is_new(small_model):
    engine = Engine(small_model, slots=3)
    first = engine.submit([1, 2, 3, 4], config=GREEDY)
    engine.submit([9, 9, 9], config=GREEDY)
    engine.run()
    # The last token was drawn, but never read.
    longer = [*first.prompt, *ids(first), 30, 31]
    second = engine.submit(longer, config=GREEDY)
    engine.run()
    assert second.reused_tokens == len(first.prompt) + len(first.tokens) - 1
    assert ids(second) == list(generate(small_model, longer, config=GREEDY))
    other = engine.submit([9, 9], config=GREEDY)
    engine.run()
    assert other.reused_tokens == 1, "the last token of a prompt is always read"


def test_a_long_prompt_is_read_in_parts_while_others_go_on(small_model):
    engine = Engine(small_model, slots=2, prefill_tokens=4)
    quick = engine.submit([1], config=GREEDY)
    slow = engine.submit(list(range(20)), config=GREEDY)
    for steps in range(1, 5):
        engine.step()
        assert (len(quick.tokens), len(slow.tokens)) == (steps, 0)
    engine.step()
    assert (len(quick.tokens), len(slow.tokens)) == (5, 1)


def test_requests_take_the_slots_in_order_of_arrival(small_model):
    engine = Engine(small_model, slots=1)
    ended = []
    for number in range(4):
        engine.submit(
            [number + 1], config=GREEDY, on_token=lambda new, n=number: ended.append(n) if new is None else None
        )
    engine.run()
    assert ended == [0, 1, 2, 3]


def test_a_cancelled_request_frees_its_slot_at_the_next_step(small_model):
    engine = Engine(small_model, slots=1)
    heard: list[NewToken | None] = []
    first = engine.submit([1], config=GREEDY, on_token=heard.append)
    second = engine.submit([2], config=GREEDY)
    never = engine.submit([3], config=GREEDY)
    engine.step()
    first.cancel()
    never.cancel()
    engine.step()
    assert (first.ended_by, len(first.tokens), len(second.tokens)) == ("cancelled", 1, 1)
    assert heard == [*first.tokens, None]
    engine.run()
    assert (never.ended_by, never.tokens) == ("cancelled", [])
    assert len(second.tokens) == 12


def test_iterating_over_a_request_lets_the_others_go_on(small_model):
    engine = Engine(small_model, slots=2)
    first, second = (engine.submit(prompt, config=GREEDY) for prompt in PROMPTS[:2])
    assert [new.token for new in first] == list(generate(small_model, PROMPTS[0], config=GREEDY))
    assert ids(second) == list(generate(small_model, PROMPTS[1], config=GREEDY))
    assert not engine.step()


@torch.no_grad()
def test_logprobs_are_the_models_own_whatever_the_temperature(model):
    config = SamplingConfig(max_new_tokens=5, temperature=0.4, top_k=3, seed=0)
    request = Engine(model).submit(PROMPTS[0], config=config, top_logprobs=4)
    text = [new.token for new in request]
    expected = model(torch.tensor([PROMPTS[0] + text]))[0, 2:-1].log_softmax(-1)
    for new, row in zip(request.tokens, expected, strict=True):
        assert new.logprob == pytest.approx(float(row[new.token]), abs=1e-4)
        values, tokens = row.topk(4)
        assert [token for token, _ in new.top] == tokens.tolist()
        torch.testing.assert_close(torch.tensor([logprob for _, logprob in new.top]), values, rtol=0, atol=1e-4)


@torch.no_grad()
def test_draws_follow_the_filtered_distribution(build):
    model = build(vocab_size=8)
    config = SamplingConfig(max_new_tokens=1, temperature=1.3, top_p=0.9)
    engine, count = Engine(model, slots=64), 3000
    requests = [engine.submit([1, 2], config=dataclasses.replace(config, seed=seed)) for seed in range(count)]
    engine.run()
    seen = torch.bincount(torch.tensor([ids(request)[0] for request in requests]), minlength=8)
    expected = count * next_token_probabilities(model(torch.tensor([[1, 2]]))[0, -1], config=config)
    kept = expected > 0
    assert 2 < kept.sum() < 8
    assert not seen[~kept].any()
    statistic = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    # The chi-square distribution's upper 1e-4 quantiles for 1 to 7 degrees of freedom; seeds are fixed, so is the outcome.
    assert statistic < [15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9][int(kept.sum()) - 2]


def test_a_smaller_context_than_the_models_ends_the_texts(small_model):
    engine = Engine(small_model, slots=2, context=10)
    request = engine.submit([1, 2, 3], config=SamplingConfig(max_new_tokens=99, temperature=0.0))
    full = engine.submit([1] * 10, config=GREEDY)
    engine.run()
    assert (len(request.tokens), request.ended_by) == (7, "context")
    assert (full.tokens, full.ended_by) == ([], "context")
    with pytest.raises(ContextError, match="prompt has 11 tokens, but the model's context is 10"):
        engine.submit([1] * 11, config=GREEDY)
    with pytest.raises(ContextError, match="A cache of 41 tokens"):
        Engine(small_model, context=41)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [([], {}, "prompt is empty"), ([67], {}, "the id 67"), ([1], {"top_logprobs": 68}, "top_logprobs is 68")],
)
def test_a_request_that_cannot_be_served_is_refused_at_the_call(small_model, prompt, options, message):
    engine = Engine(small_model)
    with pytest.raises(SamplingError, match=message):
        engine.submit(prompt, config=GREEDY, **options)
    assert not engine.busy


@pytest.mark.parametrize("options", [{"slots": 0}, {"prefill_tokens": 0}])
def test_an_engine_without_room_is_refused(small_model, options):
    with pytest.raises(SamplingError, match=f"{next(iter(options))} is 0"):
        Engine(small_model, **options)


def test_requests_may_come_from_other_threads_while_the_engine_runs(small_model):
    engine = Engine(small_model, slots=3)
    requests = []
    threads = [
        threading.Thread(target=lambda: requests.append(engine.submit(PROMPTS[0], config=GREEDY))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.busy:
        engine.step()
    assert len(requests) == 8
    assert all(ids(request) == list(generate(small_model, PROMPTS[0], config=GREEDY)) for request in requests)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_request_whose_numbers_are_not_finite_fails_alone_and_leaves_nothing_behind(build, temperature):
    model = build(tie_embeddings=False)
    model.model.embed_tokens.weight[66] = torch.nan
    config = SamplingConfig(max_new_tokens=12, temperature=temperature, seed=3, stop_token_ids=(66,))
    engine, ended = Engine(model, slots=2), []
    spoilt = engine.submit([4, 66, 5, 66, 6, 7], config=config, top_logprobs=2, on_token=ended.append)
    others = [engine.submit(prompt, config=config) for prompt in ([7, 8], [4, 1], [2, 3])]
    engine.run()
    assert (spoilt.ended_by, spoilt.tokens, ended) == ("failed", [], [None])
    with pytest.raises(NotFiniteError):
        list(spoilt)
    # The second and the third stand in the slots of the first ones, among places that hold what those have read.
    expected = [list(generate(model, request.prompt, config=config)) for request in others]
    assert [ids(request) for request in others] == expected
    assert min(map(len, expected)) > 6
