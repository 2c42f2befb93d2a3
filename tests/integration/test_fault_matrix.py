"""The table of faults names tests that there are, and what no test of a single fault can show."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anarcho_tokenize import TokenizerError
from anarcho_tokenize.chat_template import ChatTemplate

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
ROWS = [line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| ")]
BACK_ENDS = {"both", "neither", "PyTorch", "MLX"}


@cache
def defined_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    links = re.findall(r"\[`(\w+)`\]\(([^)]+)\)", DOCUMENT.read_text("utf-8"))
    assert len(links) > 80
    missing = []
    for name, path in links:
        file = (DOCUMENT.parent / path).resolve()
        if not (file.is_relative_to(ROOT / "tests") and file.is_file() and name in defined_in(file)):
            missing.append((name, path))
    assert not missing


def test_every_fault_has_a_promise_a_test_and_its_back_ends() -> None:
    faults = [row.strip("|").split(" | ") for row in ROWS if not row.startswith("| fault ")]
    assert len(faults) > 40
    for row in faults:
        fault, promise, proofs, back_ends = (cell.strip() for cell in row)
        assert fault
        assert promise
        assert "](../tests/" in proofs, fault
        assert back_ends in BACK_ENDS, fault


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_no_package_can_unpickle() -> None:
    sources = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("apps/*/src/**/*.py")]
    assert len(sources) > 100
    loading = []
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = dotted(node.func) if isinstance(node, ast.Call) else ""
            allows = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
            unpickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & set(names)
            if (
                unpickles
                or allows
                or called in {"torch.load", "torch.jit.load", "np.load", "numpy.load", "eval", "exec"}
            ):
                loading.append(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}")
    assert not loading


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__base__.__subclasses__() | length }}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ (messages[0] | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) + raise_exception('it was formatted') }}",
        "{% include '/etc/passwd' %}",
        "{% set _ = messages.append({'role': 'user', 'content': 'injected'}) %}",
        "{{ range(10 ** 9) | list | length }}",
    ],
)
def test_a_template_gets_at_nothing_but_the_conversation(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unused: Any = SimpleNamespace(plain=re.compile("(?!)"))
    stranger = ChatTemplate(template, tokenizer=unused, spellings=unused, special_tokens={}, name="The template")
    with pytest.raises(TokenizerError, match=r"The template refuses the conversation \((?!it was formatted)"):
        stranger.render([("user", "x")])
    assert not (tmp_path / "owned").exists()
