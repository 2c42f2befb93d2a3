"""Conversations as tokens: the chat template, and encoders that cannot be talked into a role.

A message is written `<|role|>` + content + `<|end|>`, with role system, user or assistant; a generation prompt is `<|assistant|>`, and the
model ends its answer with `<|end|>`. What is notable:

* Nothing but special tokens stands between contents, no line break either, so that each content is encoded by itself, no piece
  straddles a boundary, and any split of a conversation between prompt and answer gives the same ids.
* Masks come from this structure, never from a search in text: they are 1 at the assistant's contents and their `<|end|>`. The template
  marks the same with `{% generation %}`, so transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)` gives equal masks.
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

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.rows import Message, Preference
from anarcho_tokenize.symbols import ASSISTANT, END, SYSTEM, USER

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
_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

MaskedIds = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Ids, and 1 where the model learns to say the id, else 0; both of shape (tokens,)."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message | Mapping[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    """Encode messages, or `{"role": ..., "content": ...}`; a content never yields a special token.

    Raises TokenizerError for a message without a known role or without text.
    """
    parts = [_message_ids(tokenizer, message, number=number) for number, message in enumerate(messages, start=1)]
    prompt = [tokenizer.special_tokens[ASSISTANT]] if add_generation_prompt else []
    return [token for part in (*parts, prompt) for token in part]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message | Mapping[str, str]]) -> MaskedIds:
    """Ids of a conversation; the mask is 1 at each token of the assistant's contents and at the `<|end|>` of each.

    Raises TokenizerError, as `encode_chat` does.
    """
    parts = [_message_ids(tokenizer, message, number=number) for number, message in enumerate(messages, start=1)]
    ids = np.array([token for part in parts for token in part], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    assistant, stop = tokenizer.special_tokens[ASSISTANT], 0
    for part in parts:
        start, stop = stop, stop + len(part)
        mask[start + 1 : stop] = part[0] == assistant
    return ids, mask


def encode_preference(tokenizer: Tokenizer, preference: Preference) -> tuple[MaskedIds, MaskedIds]:
    """The prompt with the chosen answer, and the prompt with the rejected one.

    The masks are 1 in the assistant's messages of the answers alone, also where the prompt holds some.
    """
    prompt, _ = encode_conversation(tokenizer, preference.prompt)
    chosen, rejected = (_answered(tokenizer, prompt, answer) for answer in (preference.chosen, preference.rejected))
    return chosen, rejected


def _answered(tokenizer: Tokenizer, prompt: npt.NDArray[np.int32], answer: tuple[Message, ...]) -> MaskedIds:
    ids, mask = encode_conversation(tokenizer, answer)
    return np.concatenate([prompt, ids]), np.concatenate([np.zeros(len(prompt), dtype=np.uint8), mask])


def _message_ids(tokenizer: Tokenizer, message: Message | Mapping[str, str], *, number: int) -> list[int]:
    """Role, content, end."""
    role, content = message if isinstance(message, Message) else (message.get("role"), message.get("content"))
    if role not in _ROLES:
        raise TokenizerError(f"Message {number} has the role {role!r}; expected system, user or assistant.")
    if not isinstance(content, str):
        raise TokenizerError(f"Message {number} has the content {content!r}; expected a text.")
    special = tokenizer.special_tokens
    return [special[_ROLES[role]], *tokenizer.encode(content), special[END]]
