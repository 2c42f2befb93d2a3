"""What the README and the page of equations show is what the package does: examples run, tables and figures are those of the code."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from anarcho_optim import VARIANTS, memory

PACKAGE = Path(__file__).resolve().parents[2] / "packages" / "anarcho-optim"
README = (PACKAGE / "README.md").read_text("utf-8")
EQUATIONS = (PACKAGE / "docs" / "equations.md").read_text("utf-8")


def examples() -> Iterator[tuple[str, str]]:
    """The heading above each python block of the README, and the block after as many empty lines as stand above it."""
    for match in re.finditer(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        before = README[: match.start(1)]
        yield re.findall(r"^#+ (.*)$", before, re.MULTILINE)[-1], "\n" * before.count("\n") + match[1]


EXAMPLES = list(examples())


def skip_without_what_it_needs(example: str) -> None:
    """Skips the test where a library that the example imports, or the compiler that torch.compile calls, is missing."""
    for node in ast.walk(ast.parse(example)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            root = name.partition(".")[0]
            if root not in sys.stdlib_module_names | {"anarcho_optim"}:
                pytest.importorskip("mlx.core" if root == "mlx" else root)
            elif name.startswith("anarcho_optim."):
                pytest.importorskip("mlx.core" if name.startswith("anarcho_optim.mlx") else "torch")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if "torch.compile(" in example and not any(map(shutil.which, compilers)):
        pytest.skip("there is no C++ compiler")


@pytest.mark.parametrize(
    ("heading", "example"), EXAMPLES, ids=[f"{i}-{heading}" for i, (heading, _) in enumerate(EXAMPLES)]
)
def test_every_example_of_the_readme_runs(heading, example, tmp_path, monkeypatch):
    skip_without_what_it_needs(example)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})


def test_the_readme_shows_the_table_that_its_first_example_prints(capsys):
    skip_without_what_it_needs(EXAMPLES[0][1])
    exec(compile(EXAMPLES[0][1], "README.md", "exec"), {"__name__": "example"})
    assert f"```text\n{capsys.readouterr().out}```" in README


def test_the_files_that_the_readme_links_to_exist():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", prose)
    assert len(links) > 4
    assert not [link for link in links if not (PACKAGE / link).exists()]


def test_the_memory_that_the_readme_names_is_what_the_package_bounds():
    section = README.split("\n## Memory\n")[1].split("\n## ")[0]
    named = {
        float(number) * {"MiB": 2**20, "GiB": 2**30}[unit] for number, unit in re.findall(r"(\d+) (MiB|GiB)", section)
    }
    assert named == {memory.BATCH_BYTES, memory.CPU_BATCH_BYTES, memory.SCRATCH_BYTES, memory.CUDA_SCRATCH_BYTES}


def tables(text: str) -> list[list[list[str]]]:
    """The rows of every Markdown table, without its head."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in t.splitlines()[2:]] for t in found]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_page_of_equations_shows_the_coefficients_that_are_used(name):
    variant = VARIANTS[name]
    paragraph = EQUATIONS.split(f"\n`{name}`, ")[1]
    rows = [tuple(map(float, row[1:])) for row in tables(paragraph)[0]]
    assert float(re.search(r"\$s = ([\d.]+)\$", paragraph)[1]) == variant.safety
    if name == "jordan":
        rows *= 5
    elif name == "polar-express-8":
        s = variant.safety
        rows = [(a / s, b / s**3, c / s**5) for a, b, c in rows[:-1]] + rows[-1:]
    assert tuple(rows) == variant.coefficients


def test_the_page_of_equations_shows_the_measured_accuracy():
    torch = pytest.importorskip("torch")
    from anarcho_optim.torch import orthogonalize

    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(256, 1024, generator=generator)
    left, right = (
        torch.linalg.qr(torch.randn(n, 256, generator=generator, dtype=torch.float64))[0] for n in (256, 1024)
    )
    spread = left * torch.logspace(0, -3, 256, dtype=torch.float64) @ right.mT
    shown = {
        row[0].strip("`"): list(map(float, row[1:])) for row in tables(EQUATIONS.split("How close they come")[1])[0]
    }
    assert set(shown) == set(VARIANTS)
    for name, variant in VARIANTS.items():
        measured = []
        for x in (gaussian.double(), spread):
            o = orthogonalize(x.float()[None], variant=variant)[0].double()
            u, _, vh = torch.linalg.svd(x, full_matrices=False)
            singular = torch.linalg.svdvals(o)
            measured += [((o - u @ vh).norm() / 16).item(), singular.min().item(), singular.max().item()]
        assert measured == pytest.approx(shown[name], abs=1.5e-3), name
