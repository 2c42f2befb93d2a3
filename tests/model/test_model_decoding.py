"""Fast paths of generation: they read what the model reads, notice changed weights, and guesses change no text."""

from __future__ import annotations

import copy

import pytest
import torch
from anarcho_model.generate.decoding.torch import reader_of
from anarcho_model.generate.drafted.torch import DraftModel
from anarcho_model.generate.drafting import PromptLookup
from anarcho_model.generate.engine.torch import Engine
from anarcho_model.generate.sampling import SamplingConfig, SamplingError
from anarcho_model.generate.stepping.torch import Stepper
from anarcho_model.generate.torch import (
    draw_tokens,
    generate,
    generate_batch,
    next_token_probabilities,
    seeded_generator,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]
GREEDY = SamplingConfig(max_new_tokens=20, temperature=0.0)


@torch.inference_mode()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("going", [[0], [1, 2], [0, 1, 2, 3], [0, 2], [0, 5]], ids=str)
def test_a_step_gives_the_models_logits_for_rows_of_any_lengths_and_leaves_the_others(model, device, going):
    model = copy.deepcopy(model).to(device)
    tokens = torch.randint(0, 67, (6, 12), generator=torch.Generator().manual_seed(0))
    lengths = [4, 9, 7, 7, 3, 11]
    stepper = Stepper(model, rows=6, capacity=12)
    stepper.read([tokens[row, :n].tolist() for row, n in enumerate(lengths)], rows=range(6), lengths=[0] * 6)
    found = stepper.step(
        [int(tokens[row, lengths[row]]) if row in going else None for row in range(6)], lengths=lengths
    )
    expected = torch.stack([model(tokens[[row], : lengths[row] + 1].to(device))[0, -1] for row in going])
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=5e-5)
    rest = [row for row in range(6) if row not in going]
    again = [model(tokens[[row], : lengths[row] + 1].to(device))[0, -1] for row in rest]
    for row, logits in zip(rest, again, strict=True):
        one = [int(tokens[row, lengths[row]]) if n == row else None for n in range(6)]
        torch.testing.assert_close(stepper.step(one, lengths=lengths)[0].cpu(), logits.cpu(), rtol=0, atol=5e-5)


@torch.inference_mode()
def test_several_tokens_of_a_row_are_read_at_once(model):
    tokens = torch.randint(0, 67, (1, 12), generator=torch.Generator().manual_seed(1))
    stepper = Stepper(model, rows=1, capacity=12)
    stepper.read(tokens[:, :5].tolist(), rows=[0], lengths=[0])
    found = stepper.read_all(tokens[0, 5:].tolist(), length=5)
    torch.testing.assert_close(found, model(tokens)[0, 5:], rtol=0, atol=5e-5)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_bfloat16_steps_are_as_near_to_float32_as_the_models_own(build, rows):
    exact = build(num_kv_heads=2)
    model = copy.deepcopy(exact).bfloat16()
    tokens = torch.randint(0, 67, (rows, 9), generator=torch.Generator().manual_seed(2))
    stepper = Stepper(model, rows=rows, capacity=9)
    stepper.read(tokens[:, :8].tolist(), rows=range(rows), lengths=[0] * rows)
    found = stepper.step(tokens[:, 8].tolist(), lengths=[8] * rows)
    expected = exact(tokens)[:, -1]
    own = (model(tokens)[:, -1].float() - expected).square().mean()
    assert (found - expected).square().mean() < 2 * own + 1e-6


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_weights_that_change_between_texts_are_noticed(build, change):
    model = build()
    engine = Engine(model, slots=1)
    before = list(generate(model, [5], config=GREEDY))
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(-3)
        else:
            weight.data = -3 * weight.data
    fresh = copy.deepcopy(model)
    assert before != list(generate(model, [5], config=GREEDY)) == list(generate(fresh, [5], config=GREEDY))
    request = engine.submit([5], config=GREEDY)
    engine.run()
    assert [new.token for new in request.tokens] == list(generate(fresh, [5], config=GREEDY))


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name of the method that it overrides
        return 2 * super().forward(input)


def test_a_model_with_layers_of_another_kind_reads_with_its_own_modules(build):
    model, plain = build(), build()
    projection = model.model.layers[0].mlp.up_proj
    doubled = Doubled(projection.in_features, projection.out_features, bias=False)
    doubled.weight = projection.weight
    model.model.layers[0].mlp.up_proj = doubled
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert reader_of(model) is None
    assert reader_of(plain) is not None
    prompts = [[5, 6], [7]]
    assert generate_batch(model, prompts, config=GREEDY) == generate_batch(plain, prompts, config=GREEDY)
    drafted = generate(model, [5, 6], config=GREEDY, draft=PromptLookup(shortest=1))
    assert list(drafted) == list(generate(plain, [5, 6], config=GREEDY))


class Guesses:
    """Right for a while, then wrong, as a script says; counts how often it is asked."""

    def __init__(self, text: list[int], right: list[int]) -> None:
        self.text, self.right, self.asked = text, right, 0

    def propose(self, tokens, *, most):
        right = self.right[self.asked % len(self.right)]
        self.asked += 1
        rest = self.text[len(tokens) : len(tokens) + right]
        return [*rest, (rest[-1] + 1) % 67 if rest else 70][:most]


@settings(deadline=None, max_examples=40)
@given(
    right=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    most=st.integers(0, 45),
    prompt=st.lists(st.integers(0, 66), min_size=1, max_size=40),
    stops=st.sets(st.integers(0, 66), max_size=6),
)
def test_no_guess_changes_a_text_greedy_or_drawn(small_model, right, temperature, most, prompt, stops):
    config = SamplingConfig(
        max_new_tokens=most, temperature=temperature, top_k=20, seed=4, stop_token_ids=tuple(sorted(stops))
    )
    alone = list(generate(small_model, prompt, config=config))
    draft = Guesses(prompt + alone, right)
    assert list(generate(small_model, prompt, config=config, draft=draft)) == alone
    assert list(generate(small_model, prompt, config=config, draft=PromptLookup(shortest=1))) == alone


def test_right_guesses_take_fewer_steps(small_model):
    text = [5, *generate(small_model, [5], config=GREEDY)]
    draft = Guesses(text, [4])
    assert [5, *generate(small_model, [5], config=GREEDY, draft=draft)] == text
    # The prompt gives one token, and each reading of four right guesses five; the wrong one after them is not kept.
    assert draft.asked == 4


def test_a_smaller_model_guesses_and_one_that_is_the_same_is_always_right(small_model, build):
    expected = list(generate(small_model, [5, 6], config=GREEDY))
    for other in (small_model, build(num_layers=1, context_length=15), build(vocab_size=30)):
        draft = DraftModel(other, guesses=3)
        for _ in range(2):  # the second time, it has already read a text
            assert list(generate(small_model, [5, 6], config=GREEDY, draft=draft)) == expected
    draft = DraftModel(small_model, guesses=3)
    assert draft.propose([5, 6, *expected[:4]], most=9) == expected[4:7]
    assert draft.propose([5, 6], most=1) == expected[:1]


def test_prompt_lookup_continues_the_latest_and_longest_occurrence():
    lookup = PromptLookup(guesses=3)
    assert lookup.propose([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], most=9) == [4, 9, 2]
    assert lookup.propose([2, 3, 4, 7, 2, 3, 5, 6, 2, 3], most=2) == [5, 6]
    assert lookup.propose([4, 4, 4], most=5) == [4]
    assert lookup.propose([1, 2, 1], most=5) == []
    assert lookup.propose([1], most=5) == []
    with pytest.raises(SamplingError, match=r"PromptLookup\.longest is 1, expected at least 2"):
        PromptLookup(longest=1)


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.3}], ids=str)
def test_tokens_drawn_for_many_rows_follow_their_distributions(filters):
    # Rows of two settings by turns, as requests of an engine may have.
    count = 8000
    config, greedy = SamplingConfig(temperature=1.3, **filters), SamplingConfig(temperature=0.0)
    row = 2 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    generator = seeded_generator(0)
    found = draw_tokens(
        row.expand(2 * count, -1), configs=[config, greedy] * count, generators=[generator] * (2 * count)
    )
    assert set(found[1::2]) == {int(row.argmax())}
    seen = torch.bincount(torch.tensor(found[::2]), minlength=8)
    expected = count * next_token_probabilities(row, config=config)
    kept = expected > 0
    assert not seen[~kept].any()
    statistic = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    # The chi-square distribution's upper 1e-4 quantiles for 1 to 7 degrees of freedom; the seed is fixed, so is the outcome.
    assert statistic < [15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9][int(kept.sum()) - 2]
