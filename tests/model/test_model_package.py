"""The package is light to import, and its README's example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "anarcho-model" / "README.md"


def test_everything_free_of_a_framework_imports_without_one():
    modules = "anarcho_model, anarcho_model.directory, anarcho_model.flops, anarcho_model.footprint, "
    modules += "anarcho_model.generate.sampling"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'mlx', 'jax', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_generation_does_for_every_framework_loads_none():
    names = ("batching", "texts", "speculation", "draws", "prompts", "steps", "drafting")
    modules = ", ".join(["anarcho_model.errors", *(f"anarcho_model.generate.{name}" for name in names)])
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'mlx'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines()[-1] == str([*range(6, 14)]), "the model has learned to count"
