"""A conversation with a model: what was said, what of it the model still reads, and answers as they are written.

What is too long for the context is left out by whole turns, the oldest first; the system message and the newest
question always stay. A turn is a question of the user with its answer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from anarcho_cli.layers import suggestion

if TYPE_CHECKING:
    from anarcho_model.generate.batching import Request
    from anarcho_model.generate.sampling import SamplingConfig
    from anarcho_tokenize import Message
    from anarcho_tokenize.loading import AnyTokenizer

    from anarcho_cli.writing import Writer

ANSWER_SHARE = 4
"""A part of this size of the context is kept free for an answer, or `max_new_tokens` where that is less."""
OPTIONS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "max_new_tokens": int, "seed": int}
"""What can be changed within a conversation, and how its value is read."""


class ChatError(ValueError):
    """A model that cannot converse, or a message that does not fit; the message is one sentence for the user."""


class Chat:
    """What was said so far, and answers to what is said next.

    Raises ChatError for a model whose vocabulary lacks the roles.
    """

    def __init__(self, writer: Writer, *, config: SamplingConfig, system: str = "") -> None:
        self.tokenizer = writer.tokenizer
        self.stops = role_token_ids(writer.tokenizer, vocab_size=writer.model.config.vocab_size)
        self.config = config
        self.system = system
        self.messages: list[Message] = []
        """User and assistant in turn, without the system message."""
        self.omitted_turns = 0
        """Turns at the beginning that the model did not read for the last answer, because they do not fit."""
        self.engine = writer.make_engine(slots=1)
        self.answers = 0

    def answer(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces; closing the iterator early keeps what was written until then.

        Raises ChatError, and forgets the question, where it does not fit into the context.
        """
        from anarcho_tokenize import Message, StreamDecoder

        prompt = self._prompt_ids([*self.messages, Message("user", question)])
        self.messages.append(Message("user", question))
        decoder, pieces = StreamDecoder(self.tokenizer), []
        request = self._request(prompt)
        try:
            for new in request:
                # A vocabulary padded to a rounder size has ids without a piece.
                if new.token < self.tokenizer.vocab_size and (piece := decoder.push(new.token)):
                    pieces.append(piece)
                    yield piece
            if piece := decoder.flush():
                pieces.append(piece)
                yield piece
        finally:
            request.cancel()
            self.messages.append(Message("assistant", "".join(pieces)))

    def undo(self) -> str:
        """Forget the last question with its answer; returns that question. Raises ChatError where there is none."""
        if not self.messages:
            raise ChatError("nothing was said yet")
        question = self.messages[-2].content
        del self.messages[-2:]
        return question

    def set_option(self, name: str, value: str) -> None:
        """Answer otherwise from now on, by an option of the command, such as temperature; `none` takes a bound away.

        Raises ChatError for a name or a value that there is not.
        """
        field = name.removeprefix("--").replace("-", "_")
        if field not in OPTIONS:
            raise ChatError(f"there is no option {name}{suggestion(field, OPTIONS)}; expected {', '.join(OPTIONS)}")
        try:
            number = None if value.lower() == "none" else OPTIONS[field](value)
            self.config = dataclasses.replace(self.config, **{field: number})
        except (TypeError, ValueError) as error:
            raise ChatError(f"{name} cannot be {value!r}; it stays {getattr(self.config, field)}") from error

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages, self.omitted_turns = [], 0

    def save(self, file: Path) -> None:
        """Write the conversation as one line of JSON, which is also a row that a model can be trained on."""
        messages = [{"role": message.role, "content": message.content} for message in self._with_system(self.messages)]
        file.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, file: Path) -> None:
        """Go on with a conversation that `save` wrote. Raises OSError, or ChatError for anything else in the file."""
        from anarcho_tokenize import Message

        try:
            found = json.loads(file.read_text(encoding="utf-8"))["messages"]
            messages = [Message(str(item["role"]), str(item["content"])) for item in found]
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(
                f'{file} holds no conversation; expected one JSON object like {{"messages": [...]}}'
            ) from error
        system = messages.pop(0).content if messages and messages[0].role == "system" else ""
        expected = ["user", "assistant"] * (len(messages) // 2)
        if [message.role for message in messages] != expected:
            raise ChatError(
                f"{file} holds messages of the roles {', '.join(message.role for message in messages)}; "
                "expected user and assistant in turn, after at most one of system"
            )
        self.reset()
        self.system, self.messages = system, messages

    def _request(self, prompt: list[int]) -> Request:
        seed = None if self.config.seed is None else (self.config.seed + self.answers) % 2**63
        self.answers += 1
        return self.engine.submit(prompt, config=dataclasses.replace(self.config, seed=seed, stop_token_ids=self.stops))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        from anarcho_tokenize import Message

        return [Message("system", self.system), *messages] if self.system else messages

    def _prompt_ids(self, messages: list[Message]) -> list[int]:
        """The ids of the system message and as many of the newest turns as leave room for an answer."""
        from anarcho_tokenize import encode_chat

        context = self.engine.context
        room = context - min(self.config.max_new_tokens, context // ANSWER_SHARE)
        ids: list[int] = []
        for omitted in range(0, len(messages), 2):
            ids = encode_chat(self.tokenizer, self._with_system(messages[omitted:]), add_generation_prompt=True)
            newest = omitted == len(messages) - 1
            # The newest question may take the room for the answer, too, as long as there is any.
            if len(ids) <= room or (newest and len(ids) < context):
                self.omitted_turns = omitted // 2
                return ids
        raise ChatError(
            f"the message and the system message take {len(ids)} tokens, but the model's context is {context}; say it shorter"
        )


def role_token_ids(tokenizer: AnyTokenizer, *, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: the end of a message, end-of-text, and the beginning of anybody's message.

    Raises ChatError where the model has no such tokens, because its tokenizer came without roles.
    """
    chat = tokenizer.chat_format
    ids = () if chat is None else (chat.end, tokenizer.eot_id, *(header[0] for header in chat.headers.values()))
    if not ids or max(ids) >= vocab_size:
        raise ChatError(
            f"this model cannot chat: among the {vocab_size} tokens of its vocabulary are none for roles; expected a model "
            "that was fine-tuned on conversations, with a tokenizer of this project or one that has ChatML's tokens"
        )
    return tuple(dict.fromkeys(ids))
