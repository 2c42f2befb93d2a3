"""Unicode normal forms, equal for every version of Python and for the `tokenizers` library.

`tokenizers` normalises by the tables of Unicode 9.0, Python by those of its own version, which grow: characters that came later gain
decompositions and an order among combining marks. A tokenizer must give one id sequence for a text everywhere and for ever, so
the characters that came later and would change a text are left as they are here; the text between them is normalised. For all other
characters the forms never change, by Unicode's stability policy.

SentencePiece's own rules (`nfkc`, `nmt_nfkc`) are not used for this: they are a table of replacements that knows nothing of the order of
combining marks, and `tokenizers` applies it to clusters of characters, which gives other results. So SentencePiece is told to take texts
as they are, and the model file carries the form in the name of its normaliser.

Source: Unicode Standard Annex 15, https://www.unicode.org/reports/tr15/; the list is the difference between Unicode 9.0 and 18.0.
"""

import re
import unicodedata
from typing import Literal

Form = Literal["identity", "nfc", "nfkc"]

NORMALIZER_NAMES: dict[Form, str] = {"nfc": "unicode_9_nfc", "nfkc": "unicode_9_nfkc"}
"""Form -> the name that says it in a model file. SentencePiece's own names differ, as its own forms do."""

_LATER = re.compile(
    "([\u0558\u058b\u058c\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa"
    "\u209d-\u209f\u32ff\ua7f1-\ua7f4\ua82c\uab69\U000105c9-\U000105e4\U00010781-\U000107bf\U00010d24-\U00010d6d"
    "\U00010eab-\U00010f85\U00011070\U0001133b\U00011383-\U000113d0\U0001145e\U00011839\U0001183a\U00011930-\U00011a99"
    "\U00011d42-\U00011f42\U0001611e-\U0001612f\U00016d67-\U00016d6a\U00016ff0\U00016ff1\U0001b123-\U0001b126\U0001ccd6-\U0001ccf9"
    "\U0001d127\U0001d128\U0001d250-\U0001d281\U0001d6a6\U0001df95-\U0001dfff\U0001e030-\U0001e6f5\U0001f16c\U0001fbf0-\U0001fbf9]+)"
)


def form_named(normalizer: str) -> Form:
    """The form that a model file's name of a normaliser stands for; identity for names that are not ours."""
    for form, name in NORMALIZER_NAMES.items():
        if name == normalizer:
            return form
    return "identity"


def normalize(text: str, form: Form) -> str:
    """The text in a normal form of Unicode 9.0."""
    if form == "identity" or text.isascii():
        return text
    name = "NFC" if form == "nfc" else "NFKC"
    # Every second part is a run of later characters.
    parts = [
        part if number % 2 else unicodedata.normalize(name, part) for number, part in enumerate(_LATER.split(text))
    ]
    return "".join(parts)
