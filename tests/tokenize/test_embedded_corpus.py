"""The embedded corpus is whole and cut where its rule says."""

import hashlib
import re

from anarcho_tokenize import embedded_documents
from anarcho_tokenize.corpus import EMBEDDED_SHA256, embedded_text


def test_text_is_the_one_that_was_recorded() -> None:
    data = embedded_text().encode()
    assert hashlib.sha256(data).hexdigest() == EMBEDDED_SHA256
    assert len(data) == 11_966_620


def test_documents_are_135_chapters_and_233_addresses() -> None:
    documents = list(embedded_documents())
    assert len(documents) == 135 + 233
    assert [int(re.match(r"CHAPTER (\d+)\.", chapter)[1]) for chapter in documents[:135]] == list(range(1, 136))
    assert documents[134].endswith("rolled on as it rolled five thousand years ago.")
    assert all(len(address) > 5000 and "\n" not in address for address in documents[135:])
    assert max(len(line) for chapter in documents[:135] for line in chapter.split("\n")) < 100


def test_documents_lose_nothing_but_the_newlines_between_them() -> None:
    text, end = embedded_text(), 0
    for document in embedded_documents():
        start = text.index(document, end)
        assert set(text[end:start]) <= {"\n"}
        assert document == document.strip("\n")
        end = start + len(document)
    assert set(text[end:]) <= {"\n"}
