"""Conversations as tokens: the chat template, and an encoder that cannot be talked into a role.

A message is written `<|role|>\\n` + content + `<|end|>\\n`, with role system, user or assistant; a generation prompt is
`<|assistant|>\\n`. The model ends its answer with `<|end|>`. Both ways of encoding give equal ids, except where a content spells a
special token: the template, applied to text by transformers, yields that token, while `encode_chat` yields plain text.
"""

from collections.abc import Mapping, Sequence

from anarcho_tokenize.bpe import Tokenizer
from anarcho_tokenize.errors import TokenizerError
from anarcho_tokenize.symbols import ASSISTANT, END, SYSTEM, USER

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The role ' + message['role'] + ' is unknown; expected system, user or assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    """Encode `{"role": ..., "content": ...}` messages; a content never yields a special token.

    Raises TokenizerError for a message without a known role or without text.
    """
    special = tokenizer.special_tokens
    ids: list[int] = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise TokenizerError(f"Message {number} has the role {role!r}; expected system, user or assistant.")
        if not isinstance(content, str):
            raise TokenizerError(f"Message {number} has the content {content!r}; expected a text.")
        ids += [special[_ROLES[role]], *tokenizer.encode("\n" + content), special[END], *tokenizer.encode("\n")]
    if add_generation_prompt:
        ids += [special[ASSISTANT], *tokenizer.encode("\n")]
    return ids
