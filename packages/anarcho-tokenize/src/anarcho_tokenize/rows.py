"""Rows of data sets as texts, conversations or preferences, whatever their columns are called.

A row is one JSON object or one line of a table. What is recognised, in this order:

* conversations: `messages`, `conversations` or `conversation` (messages `{role, content}`, or ShareGPT's `{from, value}`);
  UltraChat's `data` (texts, of the user and of the assistant in turn); a question and its answer, as `prompt` and `completion`,
  `instruction` (with `input` or `context`) and `output`, `question` and `answer`, and alike, of texts or of messages;
* preferences: `chosen` and `rejected`, texts or messages, with a `prompt` or with a common beginning that is the prompt; dialogues in
  one text of turns `\\n\\nHuman:` and `\\n\\nAssistant:` (HH-RLHF: Bai et al. 2022, https://arxiv.org/abs/2204.05862); UltraFeedback's
  `instruction` and scored `completions`, the best against the worst (Cui et al. 2023, https://arxiv.org/abs/2310.01377);
* with either, a `system` or `system_prompt` that goes before.

A column that holds null is as good as absent. Texts stay exactly as they are, but for white space at the ends of those that are cut
out of a longer one. Whatever a row lacks is a `RowError` of one sentence.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import NamedTuple

from anarcho_tokenize.config import Kind


class Message(NamedTuple):
    """What one side of a conversation says."""

    role: str
    """`system`, `user` or `assistant`."""

    content: str


class Preference(NamedTuple):
    """A prompt with a better and a worse answer; each answer ends with a message of the assistant."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


Content = str | tuple[Message, ...] | Preference
"""What a row holds, by kind: a text, a conversation, a preference."""

Row = Mapping[str, object]
_Parts = tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]


class RowError(ValueError):
    """A row is none of the kind that is read; one sentence, to which the caller adds the place."""


_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
_CONVERSATIONS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "instruction", "question", "query")
_ANSWERS = ("completion", "response", "output", "answer")
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system_prompt", "system")
_SCORES = ("overall_score", "fine-grained_score")
_CALLS = ("tool_calls", "function_call")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SHOWN_CHARACTERS = 60


def content_of(row: Row, *, kind: Kind, text_field: str | None = None) -> Content:
    """What a row holds, by kind. Raises RowError."""
    if kind == "chat":
        return conversation_of(row)
    return preference_of(row) if kind == "preference" else text_of(row, text_field=text_field)


def text_of(row: Row, *, text_field: str | None = None) -> str:
    """The document in the column `text_field`; in `text`, or else `content`, when not given."""
    for name in ("text", "content") if text_field is None else (text_field,):
        if row.get(name) is not None:
            return _text(row[name], name=f"The column {name!r}")
    expected = "'text' or 'content', or the right column as text_field" if text_field is None else repr(text_field)
    raise RowError(f"The row has {_columns(row)}; expected {expected}.")


def conversation_of(row: Row) -> tuple[Message, ...]:
    """The messages of a conversation, among which is at least one of the assistant."""
    messages = _with_system(row, _conversation(row))
    _check_order(messages, name="The conversation")
    if not any(message.role == "assistant" for message in messages):
        raise RowError(
            f"The conversation of {len(messages)} messages has none of the assistant; expected one to learn from."
        )
    return messages


def preference_of(row: Row) -> Preference:
    """A prompt and two answers to it that differ."""
    if row.get("chosen") is None and row.get("completions") is not None:
        prompt, chosen, rejected = _ranked(row)
    elif row.get("chosen") is None or row.get("rejected") is None:
        raise RowError(f"The row has {_columns(row)}; expected 'chosen' and 'rejected' of a preference.")
    elif (question := next((name for name in _QUESTIONS if row.get(name) is not None), None)) is not None:
        prompt, chosen, rejected = _explicit(row, question)
    else:
        prompt, chosen, rejected = _implicit(row["chosen"], row["rejected"])
    return _preference(_with_system(row, (*prompt, *chosen)), _with_system(row, (*prompt, *rejected)))


def texts_of(content: Content) -> Iterator[str]:
    """Every text in it, in order; of a preference, the prompt once."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Preference):
        yield from (message.content for part in content for message in part)
    else:
        yield from (message.content for message in content)


def digest_of(content: Content) -> bytes:
    """SHA-256 that names it: of a text's UTF-8 bytes, or of the messages as JSON `[[role, content], ...]` without spaces."""
    if not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode()).digest()


def _conversation(row: Row) -> tuple[Message, ...]:
    for name in _CONVERSATIONS:
        if row.get(name) is not None:
            return _messages(row[name], name=name)
    if isinstance(turns := row.get("data"), list | tuple):
        texts = [_text(turn, name=f"Turn {number} of 'data'") for number, turn in enumerate(turns, start=1)]
        return tuple(Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))
    question = next((name for name in _QUESTIONS if row.get(name) is not None), None)
    answer = next((name for name in _ANSWERS if row.get(name) is not None), None)
    if question is None or answer is None:
        raise RowError(
            f"The row has {_columns(row)}; expected 'messages', 'conversations', or a pair such as 'prompt' and 'completion'."
        )
    return (*_side(row, question, role="user"), *_side(row, answer, role="assistant"))


def _with_system(row: Row, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages behind the row's system prompt, if it has one and they have none."""
    system = next((row[name] for name in _SYSTEMS if row.get(name) not in (None, "")), None)
    if system is None or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", _text(system, name="The system prompt")), *messages)


def _side(row: Row, name: str, *, role: str) -> tuple[Message, ...]:
    """A column that holds messages, or the text of one; an instruction's input stands below it."""
    value = row[name]
    if isinstance(value, list | tuple):
        return _messages(value, name=name)
    text = _text(value, name=f"The column {name!r}")
    if name == "instruction":
        contexts = (row[context] for context in _CONTEXTS if row.get(context) is not None)
        text = "\n\n".join([text, *(_text(context, name="The input") for context in contexts if context != "")])
    return (Message(role, text),)


def _messages(value: object, *, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise RowError(f"The column {name!r} holds {_shown(value)}; expected a list of messages.")
    return tuple(_message(item, name=f"Message {number} of {name!r}") for number, item in enumerate(value, start=1))


def _message(value: object, *, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(f"{name} is {_shown(value)}; expected an object with role and content.")
    role_key, content_key = ("from", "value") if value.get("role") is None else ("role", "content")
    role, content = value.get(role_key), value.get(content_key)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise RowError(f"{name} has the role {_shown(role)}; expected system, user or assistant.")
    if calls := [key for key in _CALLS if value.get(key)]:
        raise RowError(f"{name} has {calls[0]}; expected messages of text alone, without calls of tools.")
    if (weight := value.get("weight")) is not None and weight != 1:
        raise RowError(
            f"{name} has the weight {_shown(weight)}; expected 1, or none: every message of the assistant counts."
        )
    if isinstance(content, list | tuple):
        content = "".join(_part(part, name=name) for part in content)
    return Message(known, _text(content, name=name))


def _part(value: object, *, name: str) -> str:
    """The text of one of the parts that a content may be a list of."""
    if isinstance(value, Mapping) and value.get("type") == "text" and isinstance(value.get("text"), str):
        return str(value["text"])
    raise RowError(f"{name} has the part {_shown(value)}; expected only parts of the type 'text'.")


def _text(value: object, *, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} holds {_shown(value)}; expected a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{name} has the lone surrogate U+{ord(value[error.start]):04X} at character {error.start}; expected Unicode text."
        ) from error
    return value


def _check_order(messages: tuple[Message, ...], *, name: str) -> None:
    late = next((number for number, message in enumerate(messages[1:], start=2) if message.role == "system"), None)
    if late is not None:
        raise RowError(f"{name} has a system message as message {late}; expected one only as the first.")


def _preference(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Preference:
    """Part two whole conversations where they first differ."""
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _check_order(messages, name=f"The {name} conversation")
        if not messages or messages[-1].role != "assistant":
            last = f"a message of the {messages[-1].role}" if messages else "no message"
            raise RowError(f"The {name} conversation ends with {last}; expected an answer of the assistant.")
    if chosen == rejected:
        raise RowError("The chosen and the rejected answer are equal; expected two that differ.")
    shared = _common_length(chosen[:-1], rejected[:-1])
    if shared == 0:
        raise RowError("The chosen and the rejected conversation share no beginning; expected a common prompt.")
    return Preference(chosen[:shared], chosen[shared:], rejected[shared:])


def _explicit(row: Row, question: str) -> _Parts:
    """A prompt beside two answers; answers as messages may repeat the prompt, and what they repeat then counts."""
    prompt = _prompt(row, question)
    chosen, rejected = _side(row, "chosen", role="assistant"), _side(row, "rejected", role="assistant")
    whole = [bool(answer) and answer[0].role != "assistant" for answer in (chosen, rejected)]
    if not any(whole):
        return prompt, chosen, rejected
    if not all(whole) or prompt[-1] not in chosen[: _common_length(chosen, rejected)]:
        raise RowError(
            f"The chosen and the rejected messages begin neither with the {question!r} {_shown(prompt[-1].content)} nor with an answer "
            "to it; expected either in both."
        )
    return (), chosen, rejected


def _prompt(row: Row, question: str) -> tuple[Message, ...]:
    prompt = _side(row, question, role="user")
    if isinstance(row[question], str) and _TURN.match(prompt[0].content):
        prompt = _turns(prompt[0].content)
        prompt = prompt[:-1] if prompt[-1] == Message("assistant", "") else prompt
    if not prompt:
        raise RowError(f"The column {question!r} holds no message; expected the prompt.")
    return prompt


def _implicit(chosen: object, rejected: object) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Two whole conversations, as messages, as dialogues in one text, or as texts of which the common words are the prompt."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return (), _messages(chosen, name="chosen"), _messages(rejected, name="rejected")
    better, worse = _text(chosen, name="The column 'chosen'"), _text(rejected, name="The column 'rejected'")
    if _TURN.match(better) and _TURN.match(worse):
        return (), _turns(better), _turns(worse)
    if better == worse:
        raise RowError("The chosen and the rejected answer are equal; expected two that differ.")
    shared = better[: _common_length(better, worse)]
    words = re.match(r".*\s", shared, re.DOTALL)
    if words is None or not words[0].strip():
        raise RowError("The chosen and the rejected text share no beginning; expected a common prompt, or a 'prompt'.")
    start = len(words[0])
    return (
        (Message("user", words[0].strip()),),
        (Message("assistant", better[start:].strip()),),
        (Message("assistant", worse[start:].strip()),),
    )


def _turns(text: str) -> tuple[Message, ...]:
    """The messages of a dialogue that is written as one text."""
    _, *parts = _TURN.split(text)
    roles = ("user" if name == "Human" else "assistant" for name in parts[::2])
    return tuple(Message(role, said.strip()) for role, said in zip(roles, parts[1::2], strict=True))


def _ranked(row: Row) -> _Parts:
    """The best and the worst of several scored answers."""
    question = next((name for name in _QUESTIONS if row.get(name) is not None), None)
    answers = row["completions"]
    if (
        question is None
        or not isinstance(answers, list | tuple)
        or not all(isinstance(one, Mapping) for one in answers)
    ):
        raise RowError(f"The row has {_columns(row)}; expected 'instruction' and 'completions', a list of objects.")
    scores = next((found for name in _SCORES if (found := _numbers(answers, name)) is not None), [])
    if len(scores) < 2 or max(scores) == min(scores):
        raise RowError(
            f"The {len(answers)} completions have the scores {scores}; expected different ones, as 'overall_score' or 'fine-grained_score'."
        )
    best, worst = answers[scores.index(max(scores))], answers[scores.index(min(scores))]
    return (
        _prompt(row, question),
        (Message("assistant", _text(best.get("response"), name="The best completion's response")),),
        (Message("assistant", _text(worst.get("response"), name="The worst completion's response")),),
    )


def _numbers(answers: Iterable[Row], name: str) -> list[float] | None:
    """The scores of this name, if every answer has one."""
    values = [answer.get(name) for answer in answers]
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return numbers if len(numbers) == len(values) else None


def _common_length(one: Iterable[object], other: Iterable[object]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _columns(row: Row) -> str:
    names = [repr(name) for name, value in row.items() if value is not None]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"the columns {listed}" if names else "no column with a value"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
