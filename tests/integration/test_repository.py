"""Rules of the repository that no single package can check: who imports whom, what is declared, what every package must have."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from anarcho_monitor import MetricsLog
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["anarcho-model", "anarcho-monitor", "anarcho-optim", "anarcho-tokenize", "anarcho-train"]
FOLDERS = {name: ROOT / "packages" / name for name in PACKAGES} | {"anarcho-cli": ROOT / "apps" / "cli"}
DISTRIBUTIONS = {root: {canonicalize_name(name) for name in names} for root, names in packages_distributions().items()}
# `compression` joined the standard library with Python 3.14, which the packages support and may look for.
STANDARD_LIBRARY = set(sys.stdlib_module_names) | {"compression"}

each_package = pytest.mark.parametrize("package", PACKAGES)
each_distribution = pytest.mark.parametrize("package", FOLDERS)


def module_of(package: str) -> str:
    return package.replace("-", "_")


def source_files(package: str) -> list[Path]:
    files = sorted((FOLDERS[package] / "src" / module_of(package)).rglob("*.py"))
    assert files, f"{package} has no source"
    return files


def project_of(package: str) -> dict:
    return tomllib.loads((FOLDERS[package] / "pyproject.toml").read_text("utf-8"))["project"]


def declared(package: str, *, extras: bool = True) -> set[str]:
    """Canonical names of the distributions that a package declares, its own extras among themselves left out."""
    project = project_of(package)
    lines = list(project["dependencies"])
    if extras:
        lines += [line for group in project.get("optional-dependencies", {}).values() for line in group]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {package}


def imports_in(tree: ast.AST) -> Iterator[str]:
    """The absolute names that a module imports, by statement or by `import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def imported_roots(source: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_in(ast.parse(source))}


def undeclared(roots: set[str], package: str) -> set[str]:
    """Imported names that are neither the package itself, nor the standard library, nor from a declared distribution."""
    allowed = declared(package)
    foreign = roots - STANDARD_LIBRARY - {module_of(package)}
    return {root for root in foreign if not allowed & DISTRIBUTIONS.get(root, {canonicalize_name(root)})}


def readme_of(package: str) -> str:
    return (FOLDERS[package] / "README.md").read_text("utf-8")


def examples_in(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_python(program: str, *, cwd: Path | None = None) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_the_packages_are_the_five_and_the_app() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")) == PACKAGES
    assert [path.parent.name for path in ROOT.glob("apps/*/pyproject.toml")] == ["cli"]


def test_the_import_scan_sees_every_way_to_import() -> None:
    source = (
        "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n    importlib.import_module('i.j')\n"
    )
    assert imported_roots(source) == {"a", "c", "h", "i"}


@each_package
def test_no_package_imports_a_sibling(package: str) -> None:
    siblings = {module_of(name) for name in FOLDERS} - {module_of(package)}
    for file in source_files(package):
        found = imported_roots(file.read_text("utf-8")) & siblings
        assert not found, f"{file.relative_to(ROOT)} imports {found}"


@each_package
def test_no_package_declares_a_sibling(package: str) -> None:
    assert not declared(package) & set(FOLDERS)


@each_distribution
def test_declared_dependencies_cover_the_imports(package: str) -> None:
    for file in source_files(package):
        missing = undeclared(imported_roots(file.read_text("utf-8")), package)
        assert not missing, f"{file.relative_to(ROOT)} imports {missing}, which {package} does not declare"


@each_package
def test_a_bare_install_without_any_extra_can_be_imported(package: str) -> None:
    base = required_by(declared(package, extras=False))
    extras = declared(package) - base
    blocked = sorted(root for root, names in DISTRIBUTIONS.items() if names & extras and not names & base)
    run_python(f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport {module_of(package)}")


def required_by(names: set[str]) -> set[str]:
    """Everything that comes along with the distributions `names` on this machine."""
    seen: set[str] = set()
    queue = sorted(names)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(canonicalize_name(requirement.name))
    return seen


@each_distribution
def test_importing_a_package_loads_neither_torch_nor_mlx(package: str) -> None:
    run_python(
        f"import sys, {module_of(package)}\n"
        "loaded = {'torch', 'mlx', 'transformers', 'tensorflow'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


@each_distribution
def test_every_package_has_what_a_published_one_needs(package: str) -> None:
    folder, project = FOLDERS[package], project_of(package)
    assert project["name"] == package
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (folder / "src" / module_of(package) / "py.typed").is_file()
    assert (folder / "LICENSE").read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")
    assert f"\n## {project['version']}\n" in (folder / "CHANGELOG.md").read_text("utf-8")
    assert readme_of(package).startswith(f"# {package}\n")


@each_package
def test_a_package_says_how_to_install_it_and_why_it_depends_on_what(package: str) -> None:
    readme = readme_of(package)
    assert f"install {package}" in readme or f'install "{package}' in readme
    unmentioned = {name for name in declared(package) if name not in readme.lower()}
    assert not unmentioned, f"the README of {package} gives no reason for {unmentioned}"


@each_package
def test_the_first_readme_example_of_a_package_runs_with_what_it_declares(package: str, tmp_path: Path) -> None:
    # Examples after the first show it beside other libraries; the package's own tests run those.
    first, *_ = examples_in(readme_of(package))
    assert not undeclared(imported_roots(first), package)
    run_python(first, cwd=tmp_path)


def test_the_apps_ranges_take_the_packages_of_this_workspace() -> None:
    # uv uses the workspace's packages whatever their versions, so only this notices a range that leaves one out.
    requirements = [Requirement(line) for line in project_of("anarcho-cli")["dependencies"]]
    ranges = {requirement.name: requirement.specifier for requirement in requirements if requirement.name in PACKAGES}
    assert sorted(ranges) == PACKAGES
    for package, specifier in ranges.items():
        assert project_of(package)["version"] in specifier, package
        assert len(specifier) == 2, f"{package} needs a lower and an upper bound"


def test_no_file_in_git_but_the_lock_names_a_package_index() -> None:
    # Whoever installs from another index must have one file alone to regenerate. Built in parts, or this file would name one.
    needles = [host.encode() for host in ("pypi" + ".org", "files.pythonhosted" + ".org", "pypi" + ".python.org")]
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name.decode() for name in listing.split(b"\0") if name and name != b"uv.lock"]
    assert ROOT / "pyproject.toml" in files
    # A file that is deleted but not yet committed is listed, too.
    naming = [file for file in files if file.is_file() and any(needle in file.read_bytes() for needle in needles)]
    assert not naming, f"these files name a package index: {naming}"


def test_the_picture_of_a_run_shows_both_losses_and_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = runpy.run_path(str(ROOT / "benchmarks" / "plot_run.py"))["draw"]
    log = MetricsLog(tmp_path / "metrics.jsonl", run="r", attempt=1)
    log.write("start", step=0, tokens=0)
    with pytest.raises(ValueError, match="no training loss"):
        draw(tmp_path, tmp_path / "empty.svg")
    for step in range(1, 9):
        log.write("train", step=step, tokens=step * 100, loss=4 / step)
        log.write("validation", step=step, tokens=step * 100, loss=5 / step, bits_per_byte=2 / step)
    log.close()
    pictures = [tmp_path / "docs" / f"{number}.svg" for number in (1, 2)]
    for picture in pictures:
        draw(tmp_path, picture)
    drawn = pictures[0].read_text("utf-8")
    assert drawn == pictures[1].read_text("utf-8")
    # Matplotlib keeps the words of a picture as comments beside their outlines.
    for words in ("training", "validation", "loss (nats per token)", "bits per byte", "0.250"):
        assert f"<!-- {words} -->" in drawn
