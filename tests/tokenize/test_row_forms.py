"""Rows as data sets have them: each known form is read, each other one refused with the reason."""

import hashlib
import json

import pytest
from anarcho_tokenize.rows import (
    Message,
    Preference,
    RowError,
    content_of,
    conversation_of,
    digest_of,
    preference_of,
    text_of,
    texts_of,
)
from hypothesis import given
from hypothesis import strategies as st

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello.\n"}
TALK = (Message("user", "Hi"), Message("assistant", " Hello.\n"))
RULE = Message("system", "Be kind.")

CONVERSATIONS = {
    "messages": {"messages": [ASKED, SAID]},
    "UltraChat 200k": {"prompt": "Hi", "prompt_id": "f0", "messages": [ASKED, SAID]},
    "UltraFeedback binarized": {"prompt": "Hi", "messages": [ASKED, SAID], "chosen": [], "score_chosen": 9.0},
    "ShareGPT": {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " Hello.\n"}]},
    "ShareGPT of Bing": {
        "conversations": [{"from": "user", "value": "Hi"}, {"from": "bing", "value": " Hello.\n", "role": None}]
    },
    "conversation": {"conversation": [ASKED | {"language": "English"}, SAID], "language": "English"},
    "UltraChat": {"id": "0", "data": ["Hi", " Hello.\n"]},
    "prompt and completion": {"prompt": "Hi", "completion": " Hello.\n"},
    "messages as prompt and completion": {"prompt": [ASKED], "completion": [SAID]},
    "Alpaca": {"instruction": "Hi", "input": "", "output": " Hello.\n", "text": "Below is an instruction ..."},
    "Dolly": {"instruction": "Hi", "context": "", "response": " Hello.\n", "category": "open_qa"},
    "GSM8K": {"question": "Hi", "answer": " Hello.\n"},
    "MetaMathQA": {"query": "Hi", "response": " Hello.\n", "type": "x"},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            {"role": "assistant", "content": [{"type": "text", "text": " Hello.\n"}]},
        ]
    },
    "null columns": {
        "messages": None,
        "conversations": None,
        "prompt": "Hi",
        "completion": " Hello.\n",
        "system": None,
    },
    "tuples": {"messages": (ASKED, SAID)},
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_are_read_in_every_form(row: dict) -> None:
    assert conversation_of(row) == content_of(row, kind="chat") == TALK


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "Be kind."}, ASKED, SAID]},
        {"messages": [{"role": "developer", "content": "Be kind."}, ASKED, SAID]},
        {"messages": [{"role": "system", "content": "Be kind."}, ASKED, SAID | {"weight": 1, "tool_calls": []}]},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, SAID]},
        {"system_prompt": "Be kind.", "question": "Hi", "response": " Hello.\n"},
        {"system": "Be kind.", "messages": [ASKED, SAID]},
        {"system": "Unused.", "messages": [{"role": "system", "content": "Be kind."}, ASKED, SAID]},
    ],
)
def test_a_system_prompt_goes_before(row: dict) -> None:
    assert conversation_of(row) == (RULE, *TALK)


def test_an_input_stands_below_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Wal", "output": "whale"}
    assert conversation_of(row) == (Message("user", "Translate.\n\nWal"), Message("assistant", "whale"))


def test_roles_need_not_take_turns_and_contents_may_be_empty() -> None:
    roles = ["system", "assistant", "assistant", "user", "user"]
    messages = tuple(Message(role, "") for role in roles)
    assert conversation_of({"messages": [message._asdict() for message in messages]}) == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "The row has no column with a value; expected 'messages', 'conversations', or a pair"),
        ({"text": "x", "url": None}, "The row has the columns 'text'; expected 'messages'"),
        ({"prompt": "x"}, "The row has the columns 'prompt'; expected"),
        ({"messages": "Hi"}, "The column 'messages' holds 'Hi'; expected a list of messages"),
        ({"messages": []}, "The conversation of 0 messages has none of the assistant"),
        ({"messages": [ASKED]}, "The conversation of 1 messages has none of the assistant"),
        ({"messages": [ASKED, "Hello."]}, "Message 2 of 'messages' is 'Hello.'; expected an object"),
        ({"messages": [ASKED, {"role": "tool", "content": "x"}]}, "Message 2 of 'messages' has the role 'tool'"),
        ({"messages": [ASKED, {"content": "x"}]}, "Message 2 of 'messages' has the role None"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
            "Message 2 of 'messages' has tool_calls; expected messages of text alone",
        ),
        (
            {"messages": [ASKED, SAID | {"weight": 0}]},
            "Message 2 of 'messages' has the weight 0; expected 1, or none",
        ),
        (
            {"messages": [{"role": "user", "content": None}, SAID]},
            "Message 1 of 'messages' holds None; expected a text",
        ),
        ({"messages": [ASKED, SAID, {"role": "system", "content": ""}]}, "a system message as message 3; expected one"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]},
            "Message 1 of 'messages' has the part {'type': 'image'}; expected only parts of the type 'text'",
        ),
        ({"data": ["Hi", 3]}, "Turn 2 of 'data' holds 3; expected a text"),
        ({"question": "Hi", "answer": 42}, "The column 'answer' holds 42; expected a text"),
        ({"question": "Hi", "answer": "a\ud800"}, r"'answer' has the lone surrogate U\+D800 at character 1"),
        ({"messages": [ASKED, {"role": "assistant", "content": "\udfff"}]}, r"lone surrogate U\+DFFF at character 0"),
        ({"system": 1, "messages": [ASKED, SAID]}, "The system prompt holds 1; expected a text"),
    ],
)
def test_what_is_no_conversation_is_refused(row: dict, reason: str) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        conversation_of(row)
    message = str(caught.value)
    assert message.endswith(".")
    assert message[0].isupper()
    assert len(message) < 300


def test_long_values_are_shortened_in_reasons() -> None:
    with pytest.raises(RowError) as caught:
        conversation_of({"messages": "x" * 10_000})
    assert len(str(caught.value)) < 200


GOOD = {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "No."}
PAIR = Preference((Message("user", "Hi"),), (Message("assistant", "Yes."),), (Message("assistant", "No."),))

PREFERENCES = {
    "texts": {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
    "question": {"question": "Hi", "chosen": "Yes.", "rejected": "No."},
    "messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "prompt as text, answers as messages": {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
    "implicit messages": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "UltraFeedback binarized": {
        "prompt": "Hi",
        "prompt_id": "f0",
        "chosen": [ASKED, GOOD],
        "rejected": [ASKED, BAD],
        "messages": [ASKED, GOOD],
        "score_chosen": 8.0,
        "score_rejected": 4.0,
    },
    "prompt repeated": {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "HH-RLHF": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yes.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No.",
    },
    "HH-RLHF with a prompt": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Yes.", "rejected": "No."},
    "UltraFeedback": {
        "source": "sharegpt",
        "instruction": "Hi",
        "models": ["a", "b", "c"],
        "completions": [
            {"response": "Maybe.", "overall_score": 5.0, "fine-grained_score": 1.0, "principle": "honesty"},
            {"response": "No.", "overall_score": 2, "fine-grained_score": 3.0},
            {"response": "Yes.", "overall_score": 8.5, "fine-grained_score": 2.0},
        ],
    },
    "UltraFeedback by fine-grained score": {
        "instruction": "Hi",
        "completions": [
            {"response": "No.", "overall_score": None, "fine-grained_score": 3.0},
            {"response": "Yes.", "overall_score": 7.0, "fine-grained_score": 4.25},
        ],
    },
}


@pytest.mark.parametrize("row", PREFERENCES.values(), ids=PREFERENCES)
def test_preferences_are_read_in_every_form(row: dict) -> None:
    assert preference_of(row) == content_of(row, kind="preference") == PAIR


def test_a_common_beginning_of_texts_is_the_prompt_in_whole_words() -> None:
    preference = preference_of({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert preference == Preference(
        (Message("user", "The sky is"),), (Message("assistant", "blue."),), (Message("assistant", "black."),)
    )


def test_dialogues_part_where_they_first_differ() -> None:
    start = "\n\nHuman: A\n\nAssistant: B\n\nwith Human: inside\n\nHuman: C"
    preference = preference_of(
        {"chosen": f"{start}\n\nAssistant: D\n\nHuman: E\n\nAssistant: F", "rejected": f"{start}\n\nAssistant: "}
    )
    assert [message.content for message in preference.prompt] == ["A", "B\n\nwith Human: inside", "C"]
    assert preference.chosen == (Message("assistant", "D"), Message("user", "E"), Message("assistant", "F"))
    assert preference.rejected == (Message("assistant", ""),)


def test_a_system_prompt_is_part_of_the_prompt() -> None:
    row = {"system": "Be kind.", "question": "Hi", "chosen": "Yes.", "rejected": "No."}
    assert preference_of(row) == PAIR._replace(prompt=(RULE, *PAIR.prompt))


def test_an_answer_may_begin_with_the_whole_other_one() -> None:
    longer = [ASKED, BAD, {"role": "user", "content": "Why?"}, GOOD]
    preference = preference_of({"chosen": longer, "rejected": [ASKED, BAD]})
    assert preference.prompt == PAIR.prompt
    assert (len(preference.chosen), len(preference.rejected)) == (3, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi"}, "The row has the columns 'prompt'; expected 'chosen' and 'rejected'"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": None}, "expected 'chosen' and 'rejected'"),
        ({"prompt": "Hi", "chosen": "Yes.", "rejected": "Yes."}, "chosen and the rejected answer are equal"),
        ({"chosen": "The sky.", "rejected": "The sky."}, "chosen and the rejected answer are equal"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "chosen and the rejected answer are equal"),
        ({"chosen": "Blue.", "rejected": "Green."}, "text share no beginning; expected a common prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "conversation share no beginning; expected a common prompt"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "The rejected conversation ends with a message of the user"),
        ({"chosen": [], "rejected": [ASKED, BAD]}, "The chosen conversation ends with no message"),
        ({"chosen": [ASKED, GOOD], "rejected": "No."}, "The column 'rejected' holds 'No.'; expected a list"),
        ({"prompt": [], "chosen": "Yes.", "rejected": "No."}, "The column 'prompt' holds no message"),
        ({"prompt": "Ho", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "begin neither with the 'prompt' 'Ho'"),
        ({"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": "No."}, "begin neither with the 'prompt' 'Hi'"),
        ({"prompt": "Hi", "chosen": "\ud800", "rejected": "No."}, "lone surrogate"),
        ({"instruction": "Hi", "completions": []}, r"The 0 completions have the scores \[\]"),
        (
            {"instruction": "Hi", "completions": [{"response": "a", "overall_score": 4}, {"overall_score": 4}]},
            r"The 2 completions have the scores \[4.0, 4.0\]; expected different ones",
        ),
        (
            {"instruction": "Hi", "completions": [{"response": "a", "overall_score": float("nan")}] * 2},
            r"have the scores \[\]; expected different ones",
        ),
        (
            {"instruction": "Hi", "completions": [{"response": "a", "overall_score": 4}, {"overall_score": 3}]},
            "The worst completion's response holds None; expected a text",
        ),
        ({"completions": [{"response": "a"}]}, "The row has the columns 'completions'; expected 'instruction'"),
    ],
)
def test_what_is_no_preference_is_refused(row: dict, reason: str) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        preference_of(row)
    assert str(caught.value).endswith(".")


def test_texts_come_from_their_column() -> None:
    assert text_of({"text": "a", "content": "b"}) == "a"
    assert text_of({"content": "b", "score": 0.9}) == content_of({"content": "b"}, kind="text") == "b"
    assert text_of({"text": None, "content": "b"}) == "b"
    assert text_of({"text": "a", "body": ""}, text_field="body") == ""


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"body": "a"}, None, "The row has the columns 'body'; expected 'text' or 'content', or the right column"),
        ({"text": "a"}, "body", "The row has the columns 'text'; expected 'body'"),
        ({"text": 3}, None, "The column 'text' holds 3; expected a text"),
        ({"text": "a\ud800"}, None, r"The column 'text' has the lone surrogate U\+D800 at character 1"),
        ({str(number): 1 for number in range(20)}, None, "'6', '7', ...; expected"),
    ],
)
def test_rows_without_a_text_are_refused(row: dict, field: str | None, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        text_of(row, text_field=field)


def test_texts_of_a_preference_hold_the_prompt_once() -> None:
    assert list(texts_of("a")) == ["a"]
    assert list(texts_of(TALK)) == ["Hi", " Hello.\n"]
    assert list(texts_of(PAIR)) == ["Hi", "Yes.", "No."]


def test_digests_are_of_the_bytes_of_a_text_and_of_compact_json_of_messages() -> None:
    assert digest_of("naïve") == hashlib.sha256("naïve".encode()).digest()
    talk = '[["user","Hi"],["assistant"," Hello.\\n"]]'
    assert digest_of(TALK) == hashlib.sha256(talk.encode()).digest()
    pair = '[[["user","Hi"]],[["assistant","Yes."]],[["assistant","No."]]]'
    assert digest_of(PAIR) == hashlib.sha256(pair.encode()).digest()


messages = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), st.text(max_size=5)), max_size=4)


@given(messages, messages)
def test_digests_are_equal_for_equal_conversations_alone(one: list[Message], other: list[Message]) -> None:
    assert (digest_of(tuple(one)) == digest_of(tuple(other))) == (one == other)


@given(messages, messages)
def test_a_conversation_survives_json(start: list[Message], rest: list[Message]) -> None:
    talk = (*start, Message("assistant", "x"), *rest)
    row = json.loads(json.dumps({"messages": [message._asdict() for message in talk]}))
    assert conversation_of(row) == talk


row_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=8,
)
columns = [
    "messages",
    "conversations",
    "data",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "completions",
    "system",
    "text",
]


@given(
    st.dictionaries(st.sampled_from(columns), row_values, max_size=5), st.sampled_from(["text", "chat", "preference"])
)
def test_any_row_is_read_or_refused_with_a_reason(row: dict, kind) -> None:
    try:
        content = content_of(row, kind=kind)
    except RowError:
        return
    assert len(digest_of(content)) == 32
    assert all(isinstance(text, str) for text in texts_of(content))
