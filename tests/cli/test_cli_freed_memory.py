"""Freed tensors' memory goes back to the system where that costs nothing, and everything else is left as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from anarcho_cli.config import resolve
from anarcho_cli.freed_memory import OWN_SETTINGS, keep_freed_memory, return_freed_memory, returns_freed_memory
from anarcho_cli.plan import library_bytes, plan_run

LEFT_AFTER_FREEING = """
import psutil, torch
from anarcho_cli.freed_memory import return_freed_memory
def left():
    torch.ones(2**20)
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        tensors = [torch.ones(2**20) for _ in range(50)]
        behind = torch.ones(2**20)
        del tensors
    return psutil.Process().memory_info().rss - before, behind
print(left()[0])
assert return_freed_memory()
print(left()[0])
"""
"""A tensor that lies behind the others keeps the end of the heap where it is."""

FAULTS_OF_A_STEP = """
import os, resource, sys, torch
from anarcho_cli.freed_memory import keep_freed_memory, return_freed_memory
return_freed_memory()
if sys.argv[1] == "keep":
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE")
    assert keep_freed_memory()
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == asked
def step():
    a = [torch.ones(2**20 + 1000 * i) for i in range(20)]
    b = [torch.ones(2**24)]
    del a
    return [torch.ones(2**20 + 1000 * i) for i in range(20)], b
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture
def plain(monkeypatch, tmp_path) -> Path:
    """An environment that says nothing of memory, and a kernel that gives huge pages to those who ask."""
    for name in (*OWN_SETTINGS, "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr("anarcho_cli.freed_memory.HUGE_PAGES", pages)
    return pages


def _printed(program: str, *arguments: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_", "GLIBC_"))}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not returns_freed_memory(), reason="freed memory is not returned on this system")
def test_the_memory_of_freed_tensors_goes_back_and_else_stays_with_the_process() -> None:
    kept, returned = map(int, _printed(LEFT_AFTER_FREEING))
    assert returned < 30 * 2**20 < 150 * 2**20 < kept


def test_thresholds_are_set_and_huge_pages_asked_for(plain: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert return_freed_memory(mallopt=lambda name, value: calls.append((name, value)) or 1)
    assert calls == [(-3, 2 * 2**20), (-1, 64 * 2**20)]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


@pytest.mark.skipif(not returns_freed_memory(), reason="freed memory is not returned on this system")
def test_a_step_that_is_repeated_finds_the_pages_of_the_step_before_where_memory_is_kept() -> None:
    (kept,), (returned,) = (map(int, _printed(FAULTS_OF_A_STEP, kind)) for kind in ("keep", "return"))
    assert kept < 100 < 1000 < returned


def test_to_keep_memory_nothing_is_mapped_or_trimmed_and_the_environment_is_as_before(plain: Path, monkeypatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert keep_freed_memory(mallopt=lambda name, value: calls.append((name, value)) or 1)
    assert calls == [(-4, 0), (-1, -1)]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "100")
    assert not keep_freed_memory(mallopt=lambda *_: pytest.fail("something was set"))


@pytest.mark.parametrize("change", ["no huge pages", "no such kernel", "macOS", "musl", "own threshold", "own choice"])
def test_nothing_is_set_where_it_would_cost_time_or_overrule_the_user(change: str, plain: Path, monkeypatch) -> None:
    if change == "no huge pages":
        plain.write_text("always madvise [never]\n")
    elif change == "no such kernel":
        plain.unlink()
    elif change == "macOS":
        monkeypatch.setattr("platform.system", lambda: "Darwin")
    elif change == "musl":
        monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    elif change == "own threshold":
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    else:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert not return_freed_memory(mallopt=lambda *_: pytest.fail("something was set"))


def test_a_forecast_for_a_cpu_counts_what_is_kept_and_one_for_cuda_neither_that_nor_libraries(plain: Path) -> None:
    config = resolve(preset="small-15m", overrides=["train.compile=off"])
    returned, cuda = (plan_run(config, device=device) for device in ("cpu", "cuda"))
    plain.write_text("always madvise [never]\n")
    kept = plan_run(config, device="cpu")
    assert kept.memory.allocator_slack > returned.memory.allocator_slack > cuda.memory.allocator_slack == 0
    assert library_bytes("off", "cpu", "torch") == returned.library_bytes > 4 * cuda.library_bytes
