"""The package as a whole: light to import, its README true, its reports right."""

import re
import subprocess
import sys
from pathlib import Path

import anarcho_tokenize
import pytest
from anarcho_tokenize import Tokenizer, inspect_tokenizer

README = Path(__file__).parents[2] / "packages" / "anarcho-tokenize" / "README.md"


def run_python(code: str, *, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd).stdout


def test_readme_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    output = run_python(example, cwd=tmp_path)
    assert re.search(r"\d+ documents, \d+ tokens, \d+ samples an epoch\n\(8, 256\) ", output)
    assert list(tmp_path.iterdir()) == []


def test_importing_package_and_configurations_loads_no_library(tmp_path: Path) -> None:
    code = (
        "import sys, anarcho_tokenize\nfrom anarcho_tokenize import TokenizerConfig, DataConfig\nTokenizerConfig(), DataConfig()\n"
        "print({'torch', 'mlx', 'numpy', 'sentencepiece', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    assert run_python(code, cwd=tmp_path) == "set()\n"


def test_using_everything_loads_neither_torch_nor_optional_libraries(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom anarcho_tokenize import *\n"
        "print({'torch', 'mlx', 'transformers', 'tokenizers', 'pyarrow', 'zstandard'} & set(sys.modules))"
    )
    assert run_python(code, cwd=tmp_path) == "set()\n"


def test_every_public_name_exists_and_is_listed() -> None:
    for name in anarcho_tokenize.__all__:
        assert getattr(anarcho_tokenize, name) is not None
        assert name in dir(anarcho_tokenize)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        anarcho_tokenize.nonsense  # noqa: B018 - the access is the test


def test_report_counts_how_a_tokenizer_writes_documents(english: Tokenizer, chapters: list[str]) -> None:
    documents = [*chapters[:3], "Ω"]
    report = inspect_tokenizer(english, documents, longest=5)
    ids = [i for document in documents for i in english.encode(document)]
    assert (report.documents, report.tokens) == (4, len(ids))
    assert report.bytes == sum(len(document.encode()) for document in documents)
    assert report.bytes_per_token == pytest.approx(report.bytes / len(ids))
    assert report.byte_token_share == pytest.approx(sum(9 <= i < 265 for i in ids) / len(ids))
    assert report.unused_pieces == len(set(range(265, 1024)) - set(ids))
    assert (report.sha256, report.vocab_size, report.special_tokens["<|end|>"]) == (english.sha256, 1024, 6)
    lengths = [len(english.token_bytes(i).decode()) for i in range(265, 1024)]
    assert [len(piece) for piece in report.longest_pieces] == sorted(lengths, reverse=True)[:5]


def test_report_without_documents_has_no_ratios(english: Tokenizer) -> None:
    report = inspect_tokenizer(english, [])
    assert (report.documents, report.bytes_per_token, report.byte_token_share, report.unused_pieces) == (
        0,
        0.0,
        0.0,
        759,
    )
