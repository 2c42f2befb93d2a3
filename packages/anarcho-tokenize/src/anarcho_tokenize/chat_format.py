"""How a tokenizer writes a message: ids before the content, one id that ends it, and ids behind.

Two formats are known: the one of tokenizers that are trained here, in which a special token stands for each role, and ChatML, in which
`<|im_start|>`, the role's name and a line break stand before a content, `<|im_end|>` and a line break behind it. A template that writes
more than these, such as a first system message of its own, is left to `chat_template`.

Source: ChatML, https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from anarcho_tokenize.symbols import ASSISTANT, END, SYSTEM, USER

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
"""Role -> its special token in tokenizers that are trained here."""
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
_CHATML = (
    "{%for message in messages%}{{'<|im_start|>'+message['role']+'\\n'+message['content']+'<|im_end|>\\n'}}{%endfor%}"
    "{%if add_generation_prompt%}{{'<|im_start|>assistant\\n'}}{%endif%}"
)


class ChatFormat(NamedTuple):
    """The ids around contents."""

    headers: Mapping[str, Sequence[int]]
    """Role -> what stands before a content; the assistant's is the generation prompt."""
    end: int
    """What ends a content; the model learns to say it."""
    tail: Sequence[int] = ()
    """What stands between that and the next message."""


def chat_format_of(special_tokens: Mapping[str, int], encode: Callable[[str], Sequence[int]]) -> ChatFormat | None:
    """The format that a tokenizer's special tokens allow, the project's own first; None for neither."""
    if END in special_tokens and all(token in special_tokens for token in ROLES.values()):
        headers = {role: [special_tokens[token]] for role, token in ROLES.items()}
        return ChatFormat(headers, special_tokens[END])
    if CHATML_START in special_tokens and CHATML_END in special_tokens:
        start = special_tokens[CHATML_START]
        headers = {role: [start, *encode(f"{role}\n")] for role in ROLES}
        return ChatFormat(headers, special_tokens[CHATML_END], encode("\n"))
    return None


def is_chatml(template: str) -> bool:
    """Whether a chat template writes plain ChatML, in one of the usual spellings of that program."""
    return re.sub(r"\{[%{].*?[%}]\}", lambda tag: _tidy(tag[0]), _named(template.strip()), flags=re.DOTALL) == _CHATML


def _named(template: str) -> str:
    """With the loop's variable named `message`."""
    loop = re.match(r"\{%-?\s*for\s+(\w+)\s+in\s+messages\b", template)
    return template if loop is None else re.sub(rf"\b{loop[1]}(?=\[|\.|\s+in\s)", "message", template)


def _tidy(tag: str) -> str:
    """A tag in one spelling: single quotes, no needless spaces, texts that are added up as one."""
    inside = tag[2:-2].strip("-").strip().replace('"', "'").replace("\n", "\\n")
    inside = re.sub(r"\bmessage\.(role|content)\b", r"message['\1']", inside)
    inside = re.sub(r"('[^']*')|\s*\+\s*", lambda part: part[1] or "+", inside)
    return f"{tag[:2]}{inside}{tag[-2:]}".replace("'+'", "")
