"""Templates of other models are rendered as transformers renders them: equal ids, equal masks, and no content that speaks for a role."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import tokenizers
from anarcho_tokenize import (
    ByteLevelTokenizer,
    Message,
    Preference,
    TokenizerError,
    encode_answer,
    encode_chat,
    encode_conversation,
    encode_preference,
    end_of_message,
    spell_chat,
)
from anarcho_tokenize.chat_format import is_chatml
from anarcho_tokenize.chat_template import ChatTemplate
from anarcho_tokenize.loading import tokenizer_of_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

SPECIAL = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN3 = """{%- set ns = namespace(seeks=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.seeks and message.role == "user" %}
        {%- set ns.seeks = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}" + CHATML
)
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'system' %}
        {{ raise_exception('Only user and assistant roles are supported!') }}
    {% endif %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set first = messages[0].content + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message.content | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ {'role': m.role, 'said': m.content} | tojson }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "chatml": CHATML,
    "chatml with a system message": WITH_SYSTEM,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "marked": MARKED,
}
SYSTEM = {"role": "system", "content": "Be <brief> & kind."}
TALK = [
    {"role": "user", "content": "  Call me Ishmael.\n"},
    {"role": "assistant", "content": "Yes, naïve 日本 \n\n"},
    {"role": "user", "content": "And the whale?"},
    {"role": "assistant", "content": "White."},
]


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    steps = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=steps.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the user and the assistant said: the whale, the white whale.\n\n"] * 20, trainer)
    made.add_tokens(["</think>"])
    return json.loads(made.to_str())


def tokenizer_with(definition: dict[str, Any], template: object) -> ByteLevelTokenizer:
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return ByteLevelTokenizer.of(definition, {**own, "chat_template": template})


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_texts_are_those_of_transformers(name: str, definition: dict[str, Any], tmp_path) -> None:
    tokenizer = tokenizer_with(definition, TEMPLATES[name])
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    talks = [TALK[:1], TALK[:2], TALK[:3], TALK, *([] if name == "mistral" else [[SYSTEM, *TALK]])]
    for messages in talks:
        for prompt in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert spell_chat(tokenizer, messages, add_generation_prompt=prompt) == text
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert encode_chat(tokenizer, messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    ("name", "end"),
    [("llama3", "<|eot_id|>"), ("qwen3", "<|im_end|>"), ("mistral", "</s>"), ("gemma", "<end_of_turn>")],
)
def test_without_marks_an_answer_is_what_follows_its_prompt_up_to_its_end(name, end, definition) -> None:
    tokenizer = tokenizer_with(definition, TEMPLATES[name])
    ids, mask = encode_conversation(tokenizer, TALK)
    assert ids.tolist() == encode_chat(tokenizer, TALK)
    learned = tokenizer.decode(ids[mask == 1], skip_special_tokens=False)
    first, second = (text.strip() for text in learned.split(end)[:2])
    assert (first, second.removeprefix("<think>\n\n</think>\n\n")) == ("Yes, naïve 日本", "White.")
    assert learned.count(end) == 2
    assert end_of_message(tokenizer) == tokenizer.special_tokens[end]
    answer, counted = encode_answer(tokenizer, TALK[:3], TALK[3:])
    assert answer.tolist() == ids.tolist()
    assert tokenizer.decode(answer[counted == 1]).endswith("White.")
    assert "Yes" not in tokenizer.decode(answer[counted == 1])


def test_marked_answers_have_the_masks_of_transformers(definition: dict[str, Any], tmp_path) -> None:
    tokenizer = tokenizer_with(definition, MARKED)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encode_conversation(tokenizer, TALK)
    assert (ids.tolist(), mask.tolist()) == (theirs["input_ids"], theirs["assistant_masks"])


def test_of_two_answers_only_their_own_tokens_are_learned(definition: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(definition, LLAMA3)
    turns = [Message(**message) for message in TALK]
    pair = Preference(prompt=tuple(turns[:3]), chosen=(turns[3],), rejected=(Message("assistant", "Blue."),))
    said = [tokenizer.decode(ids[mask == 1]) for ids, mask in encode_preference(tokenizer, pair)]
    assert said == ["White.", "Blue."]


@settings(max_examples=60, deadline=None)
@given(content=st.lists(st.sampled_from([*SPECIAL, "the ", "\ufdd0", "\ufdd1", "7", "\ufdd2", "\n", "é"])).map("".join))
def test_no_content_speaks_for_a_role(content: str) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=SPECIAL, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([], trainer)
    tokenizer = tokenizer_with(json.loads(made.to_str()), WITH_SYSTEM)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    ids, mask = encode_conversation(tokenizer, messages)
    control = [token for token in ids.tolist() if token < len(SPECIAL)]
    start, end = (tokenizer.special_tokens[token] for token in ("<|im_start|>", "<|im_end|>"))
    assert control == [start, end] * 3
    assert tokenizer.decode(ids[mask == 1]) == content
    assert tokenizer.decode(ids).count(content) >= 2


def test_another_process_makes_the_same_conversations(definition: dict[str, Any]) -> None:
    tokenizer = tokenizer_with(definition, [{"name": "tools", "template": ""}, {"name": "default", "template": GEMMA}])
    again = tokenizer_of_bytes(tokenizer.model_bytes)
    assert encode_chat(again, TALK) == encode_chat(tokenizer, TALK)


def test_spaces_that_a_special_token_takes_are_taken(definition: dict[str, Any], tmp_path) -> None:
    changed = json.loads(json.dumps(definition))
    for token in changed["added_tokens"]:
        if token["content"] == "<|eot_id|>":
            token.update(lstrip=True, rstrip=True)
    tokenizer = tokenizer_with(changed, LLAMA3.replace("<|eot_id|>", " <|eot_id|>\n"))
    tokenizer.save(tmp_path)
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert encode_chat(tokenizer, TALK) == expected


def test_chatml_is_recognised_in_its_usual_spellings_alone() -> None:
    tight = (
        '{%- for message in messages -%}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}'
        '{%- endfor -%}{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}'
    )
    assert is_chatml(CHATML)
    assert is_chatml(tight)
    for other in (WITH_SYSTEM, QWEN3, CHATML.replace("m['content']", "m['content'] | trim"), CHATML.replace("\n", " ")):
        assert not is_chatml(other)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MISTRAL, r"refuses the conversation \(Only user and assistant roles are supported!\)"),
        ("{% for %}", "is no valid Jinja template"),
        ("{{ messages.__class__.__mro__ }}", "refuses the conversation"),
    ],
)
def test_what_a_template_refuses_is_said_with_its_name(template: str, message: str, definition) -> None:
    tokenizer = tokenizer_with(definition, template)
    with pytest.raises(TokenizerError, match=rf"The chat template of tokenizer\.json {message}"):
        encode_chat(tokenizer, [SYSTEM, *TALK])


def test_answers_that_cannot_be_told_apart_are_refused(definition: dict[str, Any]) -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    with pytest.raises(TokenizerError, match=r"ends message 2 with no special token"):
        encode_conversation(tokenizer_with(definition, endless), TALK)
    assert end_of_message(tokenizer_with(definition, endless)) is None
    counted = "{{ messages | length }}" + LLAMA3
    with pytest.raises(TokenizerError, match=r"does not write message 2 behind the prompt .* 'generation'"):
        encode_conversation(tokenizer_with(definition, counted), TALK)
    partly = MARKED.replace("m.role == 'assistant'", "m.content == 'White.'")
    with pytest.raises(TokenizerError, match=r"marks 1 answers of 2"):
        encode_conversation(tokenizer_with(definition, partly), TALK)


def test_without_the_library_one_sentence_says_what_to_install(definition, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(definition, GEMMA)
    assert isinstance(tokenizer.chat_format, ChatTemplate), "a tokenizer is read without the library"
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(TokenizerError, match=r"needs jinja2; install anarcho-tokenize\[chat-template\]"):
        encode_chat(tokenizer, TALK)
