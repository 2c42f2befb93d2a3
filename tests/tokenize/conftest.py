"""Tokenizers that are trained once for all tests: one on English, one on text with runs of spaces, code and other scripts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from anarcho_tokenize import (
    Tokenizer,
    TokenizerConfig,
    TokenShards,
    embedded_documents,
    train_tokenizer,
    write_shards,
)

CODE = """def banana(nana, ananas):
    for anna in range(1000):
        if nana ==  anna:
\t\treturn "banana" +   'ananas'
            # aaaa aaaaaaa abababab papa mama xxxxx

日本語のテキスト。 Привет, мир! Ελληνικά العربية naïve café 😀👩‍👩‍👧
"""


@pytest.fixture(scope="session")
def chapters() -> list[str]:
    """Sixty chapters of Moby-Dick."""
    return list(embedded_documents())[:60]


@pytest.fixture(scope="session")
def english(chapters: list[str]) -> Tokenizer:
    return train_tokenizer(chapters, config=TokenizerConfig(vocab_size=1024))


@pytest.fixture(scope="session")
def mixed(chapters: list[str]) -> Tokenizer:
    documents = [*chapters[:10], *[CODE * 20] * 20]
    return train_tokenizer(documents, config=TokenizerConfig(vocab_size=700, character_coverage=1.0))


@pytest.fixture(scope="session", params=["english", "mixed"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def prepare(tmp_path: Path, english: Tokenizer) -> Callable[..., TokenShards]:
    """Prepare documents without a validation part, and open them."""

    def prepared(documents: list[str], *, shard_tokens: int = 50, name: str = "data") -> TokenShards:
        write_shards(documents, english, tmp_path / name, validation_fraction=0, shard_tokens=shard_tokens)
        return TokenShards.open(tmp_path / name / "train")

    return prepared
