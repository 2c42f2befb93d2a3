"""Conversations as tokens: the chat template, and encoders that cannot be talked into a role.

A message is written `<|role|>` + content + `<|end|>`, with role system, user or assistant; a generation prompt is `<|assistant|>`, and the
model ends its answer with `<|end|>`. What is notable:

* Nothing but special tokens stands between contents, no line break either, so that each content is encoded by itself, no piece
  straddles a boundary, and any split of a conversation between prompt and answer gives the same ids.
* Masks come from this structure, never from a search in text: they are 1 at the assistant's contents and their `<|end|>`. The template
  marks the same with `{% generation %}`, so transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)` gives equal masks.
* Foreign tokenizers that have the tokens of ChatML write conversations in that format, see `chat_format`; a text that their own template
  adds, such as a first system message, is not added here.
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

    Raises TokenizerError for a message without a known role or without text.
    """
    chat = _format_of(tokenizer)
    ids: list[int] = []
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number=number)
        ids += [*chat.headers[role], *tokenizer.encode(content), chat.end, *chat.tail]
    return [*ids, *chat.headers["assistant"]] if add_generation_prompt else ids


def encode_conversation(tokenizer: AnyTokenizer, messages: Sequence[Message | Mapping[str, str]]) -> MaskedIds:
    """Ids of a conversation; the mask is 1 at each token of the assistant's contents and at the `<|end|>` of each.

    Raises TokenizerError, as `encode_chat` does.
    """
    chat = _format_of(tokenizer)
    parts: list[tuple[list[int], int]] = []
    for number, message in enumerate(messages, start=1):
        role, content = _checked(message, number=number)
        answer = [*tokenizer.encode(content), chat.end]
        parts += [([*chat.headers[role]], 0), (answer, int(role == "assistant")), ([*chat.tail], 0)]
    ids = np.array([token for part, _ in parts for token in part], dtype=np.int32)
    mask = np.repeat(np.array([learned for _, learned in parts], dtype=np.uint8), [len(part) for part, _ in parts])
    return ids, mask


def encode_preference(tokenizer: AnyTokenizer, preference: Preference) -> tuple[MaskedIds, MaskedIds]:
    """The prompt with the chosen answer, and the prompt with the rejected one.

    The masks are 1 in the assistant's messages of the answers alone, also where the prompt holds some.
    """
    prompt, _ = encode_conversation(tokenizer, preference.prompt)
    chosen, rejected = (_answered(tokenizer, prompt, answer) for answer in (preference.chosen, preference.rejected))
    return chosen, rejected


def _answered(tokenizer: AnyTokenizer, prompt: npt.NDArray[np.int32], answer: tuple[Message, ...]) -> MaskedIds:
    ids, mask = encode_conversation(tokenizer, answer)
    return np.concatenate([prompt, ids]), np.concatenate([np.zeros(len(prompt), dtype=np.uint8), mask])


def _format_of(tokenizer: AnyTokenizer) -> ChatFormat:
    if tokenizer.chat_format is None:
        raise TokenizerError(
            "The tokenizer has neither the special tokens of this project's conversations nor those of ChatML; "
            "expected <|im_start|> and <|im_end|>."
        )
    return tokenizer.chat_format


def _checked(message: Message | Mapping[str, str], *, number: int) -> tuple[str, str]:
    """Role and content."""
    role, content = message if isinstance(message, Message) else (message.get("role"), message.get("content"))
    if role not in ROLES:
        raise TokenizerError(f"Message {number} has the role {role!r}; expected system, user or assistant.")
    if not isinstance(content, str):
        raise TokenizerError(f"Message {number} has the content {content!r}; expected a text.")
    return role, content
