"""Conversations as tokens: the chat template, and encoders that cannot be talked into a role.

A message is written `<|role|>` + content + `<|end|>`, with role system, user or assistant; a generation prompt is `<|assistant|>`, and the
model ends its answer with `<|end|>`. What is notable:

* Nothing but special tokens stands between contents, no line break either, so that each content is encoded by itself, no piece
  straddles a boundary, and any split of a conversation between prompt and answer gives the same ids.
* Masks come from this structure, never from a search in text: they are 1 at the assistant's contents and their `<|end|>`. The template
  marks the same with `{% generation %}`, so transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)` gives equal masks.
* Foreign tokenizers write conversations as their own chat template does, see `chat_template`; those whose template is ChatML, or that
  have its tokens and no template, in that format, see `chat_format`.
* The template and the encoders give equal ids, except where a content spells a special token: the template, applied to text by
  transformers, yields that token, while the encoders yield plain text.

Users of the saved template: transformers renders `{% generation %}`, and with it all that call its `apply_chat_template`; llama.cpp
passes over it (common/jinja/parser.cpp, and google/minja since its issue 28). Bare Jinja and minijinja refuse it as an unknown tag; there,
take both tags out. The template spells no role token in one piece: without `--jinja`, llama.cpp takes one that has `<|assistant|>` and
`<|end|>` for Phi-3's (src/llama-chat.cpp), with its line breaks, and would be silently wrong where it now reports an unknown template.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from anarcho_tokenize.chat_format import ROLES, ChatFormat
from anarcho_tokenize.chat_template import ChatTemplate
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.loading import AnyTokenizer
from anarcho_tokenize.rows import Message, Preference

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The role ' + message['role'] + ' is unknown; expected system, user or assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|' + 'assistant' + '|>' }}{% endif %}"
)

MaskedIds = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Ids, and 1 where the model learns to say the id, else 0; both of shape (tokens,)."""


def encode_chat(
    tokenizer: AnyTokenizer, messages: Sequence[Message | Mapping[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    """Encode messages, or `{"role": ..., "content": ...}`; a content never yields a special token.

    Raises TokenizerError for a message without a known role or without text, and for what a foreign template refuses.
    """
    chat = _format_of(tokenizer)
    if isinstance(chat, ChatTemplate):
        turns = _turns(messages)
        return chat.encode(turns, add_generation_prompt=add_generation_prompt) if turns or add_generation_prompt else []
    ids: list[int] = []
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number=number)
        ids += [*chat.headers[role], *tokenizer.encode(content), chat.end, *chat.tail]
    return [*ids, *chat.headers["assistant"]] if add_generation_prompt else ids


def encode_conversation(tokenizer: AnyTokenizer, messages: Sequence[Message | Mapping[str, str]]) -> MaskedIds:
    """Ids of a conversation; the mask is 1 at each token of the assistant's contents and at the `<|end|>` of each.

    Raises TokenizerError, as `encode_chat` does.
    """
    return encode_answer(tokenizer, (), messages)


def encode_answer(
    tokenizer: AnyTokenizer,
    prompt: Sequence[Message | Mapping[str, str]],
    answer: Sequence[Message | Mapping[str, str]],
) -> MaskedIds:
    """Ids of a conversation; the mask is 1 in the assistant's messages of the answer alone, also where the prompt holds some.

    Raises TokenizerError, as `encode_chat` does.
    """
    chat, messages = _format_of(tokenizer), [*prompt, *answer]
    if isinstance(chat, ChatTemplate):
        return chat.encode_answers(_turns(messages), first=len(prompt)) if messages else _joined([])
    parts: list[tuple[list[int], int]] = []
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number=number)
        said = [*tokenizer.encode(content), chat.end]
        learned = int(role == "assistant" and number > len(prompt))
        parts += [([*chat.headers[role]], 0), (said, learned), ([*chat.tail], 0)]
    return _joined(parts)


def encode_preference(tokenizer: AnyTokenizer, preference: Preference) -> tuple[MaskedIds, MaskedIds]:
    """The prompt with the chosen answer, and the prompt with the rejected one.

    The masks are 1 in the assistant's messages of the answers alone, also where the prompt holds some.
    """
    prompt = preference.prompt
    return encode_answer(tokenizer, prompt, preference.chosen), encode_answer(tokenizer, prompt, preference.rejected)


def end_of_message(tokenizer: AnyTokenizer) -> int | None:
    """The token that the model says at the end of an answer; None where conversations are not known, or cannot be written."""
    try:
        return None if tokenizer.chat_format is None else tokenizer.chat_format.end
    except TokenizerError:
        return None


def spell_chat(
    tokenizer: AnyTokenizer, messages: Sequence[Message | Mapping[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as a text in which special tokens are spelled, as transformers' `apply_chat_template` writes it.

    Raises TokenizerError, as `encode_chat` does.
    """
    chat = _format_of(tokenizer)
    if isinstance(chat, ChatTemplate):
        return chat.spell(_turns(messages), add_generation_prompt=add_generation_prompt)
    ids = encode_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.decode(ids, skip_special_tokens=False)


def _joined(parts: Sequence[tuple[Sequence[int], int]]) -> MaskedIds:
    """Ids of several parts, each of which is learned (1) or not (0)."""
    ids = np.array([token for part, _ in parts for token in part], dtype=np.int32)
    mask = np.repeat(np.array([learned for _, learned in parts], dtype=np.uint8), [len(part) for part, _ in parts])
    return ids, mask


def _format_of(tokenizer: AnyTokenizer) -> ChatFormat | ChatTemplate:
    if tokenizer.chat_format is None:
        raise TokenizerError(
            "The tokenizer has no chat template, and neither the special tokens of this project's conversations nor those of "
            "ChatML; expected a template, or <|im_start|> and <|im_end|>."
        )
    return tokenizer.chat_format


def _turns(messages: Sequence[Message | Mapping[str, str]]) -> list[tuple[str, str]]:
    return [_checked(message, number=number) for number, message in enumerate(messages, start=1)]


def _checked(message: Message | Mapping[str, str], *, number: int) -> tuple[str, str]:
    """Role and content."""
    role, content = message if isinstance(message, Message) else (message.get("role"), message.get("content"))
    if role not in ROLES:
        raise TokenizerError(f"Message {number} has the role {role!r}; expected system, user or assistant.")
    if not isinstance(content, str):
        raise TokenizerError(f"Message {number} has the content {content!r}; expected a text.")
    return role, content
