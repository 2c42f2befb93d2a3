"""Conversations in the words of a tokenizer's own chat template, for formats that `chat_format` does not know.

A template is a program in Jinja that comes with a model. It is rendered in a sandbox (`template_sandbox`) with the settings and functions
that transformers gives it, and the rendered text is encoded as transformers does, so that ids are equal. What is notable:

* A content cannot speak for a role. Where it spells a special token, the template is given a private character in its place, and the
  spelling is put back as plain text. Transformers would yield that token.
* Masks are taken from `{% generation %}`, as transformers takes them, where the template has such blocks. Without, an answer is what
  follows the prompt that asks for it, up to the special token that ends it.
* A template that tells the date (`strftime_now`) gives other ids on another day, here as there.

The library is jinja2 (extra `chat-template`), loaded when the first conversation is written.

Source: the documentation of transformers, https://huggingface.co/docs/transformers/chat_templating_writing.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.spelling import Encodes, Spellings

if TYPE_CHECKING:
    import jinja2

    from anarcho_tokenize.template_sandbox import TemplateSandbox

# Noncharacters of Unicode, which stand in no text that is meant for people: around the number of a hidden spelling, and around an answer.
_HIDDEN, _SHOWN, _BEGIN, _END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_HIDDEN_SPELLING = re.compile(f"{_HIDDEN}([0-9]+){_SHOWN}")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

Turn = tuple[str, str]
"""Role and content."""


class Rendered(NamedTuple):
    """What a template made of a conversation."""

    text: str
    """With special tokens spelled, and with numbers in place of those that contents spell."""
    answers: list[tuple[int, int]]
    """First character of each `{% generation %}` block, and the one behind it."""
    hidden: Sequence[str]
    """Spellings, by number."""

    def plain(self, start: int, stop: int) -> str:
        """The text of some characters as it was meant."""
        return _HIDDEN_SPELLING.sub(lambda match: self.hidden[int(match[1])], self.text[start:stop])


class ChatTemplate:
    """A template with its tokenizer; it stands where a `ChatFormat` would."""

    headers: Mapping[str, Sequence[int]] = {}
    """Nothing is known of what stands before a content."""

    def __init__(
        self, text: str, *, tokenizer: Encodes, spellings: Spellings, special_tokens: Mapping[str, str], name: str
    ) -> None:
        """`special_tokens` are what the template may name, such as `bos_token`; `name` is for messages."""
        self.text = text
        self.name = name
        self._tokenizer = tokenizer
        self._spellings = spellings
        self._special_tokens = dict(special_tokens)

    @cached_property
    def end(self) -> int:
        """The special token that ends an answer. Raises TokenizerError for a template that has none, or cannot be rendered."""
        asked = [("user", "x")]
        text = self.render([*asked, ("assistant", "x")]).text
        prompt = self._prompt(asked, text, number=1)
        ends = [part.token for part in self._spellings.stretches(text) if part.start >= len(prompt)]
        found = next((token for token in ends if token is not None), None)
        if found is None:
            raise TokenizerError(
                f"{self.name} ends no answer with a special token; expected one, such as the end of text."
            )
        return found

    def spell(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, with special tokens spelled."""
        rendered = self.render(turns, add_generation_prompt=add_generation_prompt)
        return rendered.plain(0, len(rendered.text))

    def encode(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation. Raises TokenizerError for what the template refuses."""
        return [
            token
            for _, _, ids in self._parts(self.render(turns, add_generation_prompt=add_generation_prompt))
            for token in ids
        ]

    def encode_answers(
        self, turns: Sequence[Turn], *, first: int = 0
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Ids, and 1 at those that the assistant says in the messages from number `first` on, counted from 0.

        Raises TokenizerError, also where the template writes the beginning of a conversation otherwise than alone.
        """
        rendered = self.render(turns)
        answers = self._answers(turns, rendered)
        said = sum(role == "assistant" for role, _ in turns[:first])
        parts = list(self._parts(rendered))
        ids = np.array([token for _, _, several in parts for token in several], dtype=np.int32)
        mask = np.zeros(len(ids), dtype=np.uint8)
        at = 0
        for start, stop, several in parts:
            for begin, end in answers[said:]:
                low, high = self._tokens_within(rendered, start, stop, several, begin=begin, end=end)
                mask[at + low : at + high] = 1
            at += len(several)
        return ids, mask

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Rendered:
        """Write a conversation. Raises TokenizerError for what the template refuses."""
        numbers: dict[str, int] = {}

        def hide(match: re.Match[str]) -> str:
            return f"{_HIDDEN}{numbers.setdefault(match[0], len(numbers))}{_SHOWN}"

        messages = [{"role": role, "content": self._unsafe.sub(hide, content)} for role, content in turns]
        try:
            sandbox, template = self._compiled
            marked = sandbox.write(
                template,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a foreign program: whatever it raises is its answer
            raise TokenizerError(f"{self.name} refuses the conversation ({error}).") from error
        text, answers, begin = "", [], 0
        for part in _MARKS.split(marked):
            # Texts outside and inside of blocks take turns.
            begin, text = len(text), text + part
            answers.append((begin, len(text)))
        return Rendered(text, answers[1::2], list(numbers))

    @cached_property
    def _unsafe(self) -> re.Pattern[str]:
        """What a content may not hold when it is given to the template."""
        return re.compile(f"{self._spellings.plain.pattern}|[{_HIDDEN}{_SHOWN}{_BEGIN}{_END}]")

    @cached_property
    def _compiled(self) -> "tuple[TemplateSandbox, jinja2.Template]":
        try:
            import jinja2

            from anarcho_tokenize.template_sandbox import TemplateSandbox
        except ImportError as error:
            raise TokenizerError(
                f"{self.name} is none of the known ones, and needs jinja2; install anarcho-tokenize[chat-template]."
            ) from error
        try:
            sandbox = TemplateSandbox(begin=_BEGIN, end=_END)
            return sandbox, sandbox.from_string(self.text)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{self.name} is no valid Jinja template ({error}).") from error

    def _answers(self, turns: Sequence[Turn], rendered: Rendered) -> list[tuple[int, int]]:
        """The characters of each answer."""
        numbers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
        if _GENERATION.search(self.text):
            if len(rendered.answers) != len(numbers):
                raise TokenizerError(
                    f"{self.name} marks {len(rendered.answers)} answers of {len(numbers)}; "
                    "expected a block 'generation' around each."
                )
            return rendered.answers
        special = [part for part in self._spellings.stretches(rendered.text) if part.token is not None]
        found = []
        for number in numbers:
            begin = len(self._prompt(turns[:number], rendered.text, number=number))
            end = next((part.stop for part in special if part.start >= begin), None)
            if end is None:
                raise TokenizerError(f"{self.name} ends message {number + 1} with no special token; expected one.")
            found.append((begin, end))
        return found

    def _prompt(self, turns: Sequence[Turn], whole: str, *, number: int) -> str:
        """What is written before an answer; it must be how the whole conversation begins."""
        prompt = self.render(turns, add_generation_prompt=True).text
        if not whole.startswith(prompt):
            raise TokenizerError(
                f"{self.name} does not write message {number + 1} behind the prompt that asks for it, so it is not known "
                "what the model is to learn; expected a block 'generation' in the template."
            )
        return prompt

    def _parts(self, rendered: Rendered) -> list[tuple[int, int, list[int]]]:
        """First character, the one behind the last, and ids of each stretch."""
        return [
            (
                part.start,
                part.stop,
                self._tokenizer.encode(rendered.plain(part.start, part.stop)) if part.token is None else [part.token],
            )
            for part in self._spellings.stretches(rendered.text)
        ]

    def _tokens_within(
        self, rendered: Rendered, start: int, stop: int, ids: Sequence[int], *, begin: int, end: int
    ) -> tuple[int, int]:
        """The tokens [low, high) of a stretch that hold any of the characters [begin, end)."""
        low, high = max(begin, start), min(end, stop)
        if low >= high:
            return 0, 0
        if low == start and high == stop:
            return 0, len(ids)
        ends = np.cumsum([len(self._tokenizer.token_bytes(token)) for token in ids])
        first, behind = (self._num_bytes(rendered.plain(start, place)) for place in (low, high))
        # Some tokenizers put a space before every text.
        lead = int(ends[-1]) - self._num_bytes(rendered.plain(start, stop))
        return (
            int(np.searchsorted(ends, first + lead, side="right")),
            int(np.searchsorted(ends, behind + lead, side="left")) + 1,
        )

    def _num_bytes(self, text: str) -> int:
        return len(self._tokenizer.normalize(text).encode())


def template_of(settings: Mapping[str, Any]) -> str | None:
    """The chat template in a tokenizer_config.json; of several, the one named default."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None
