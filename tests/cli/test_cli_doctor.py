"""The doctor: facts with injected machines, and a self-test that notices wrong numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from anarcho_cli import diagnosis, selftest


def test_the_doctor_finds_this_machine_healthy_and_says_so_in_json(anarcho) -> None:
    result = anarcho("doctor", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["healthy"] is True
    assert {(check["device"], check["name"]) for check in facts["self_test"]} >= {
        ("cpu", "matmul"),
        ("cpu", "attention"),
        ("cpu", "token_logprobs"),
    }
    assert all(0 < check["max_error"] < selftest.TOLERANCE for check in facts["self_test"])
    assert facts["packages"]["torch"] is not None
    assert facts["processor"]["memory_bytes"] > 0


def test_a_device_that_computes_wrong_is_reported_with_exit_status_1(anarcho, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = selftest.causal_attention
    monkeypatch.setattr(selftest, "causal_attention", lambda q, k, v: exact(q, k, v) + 0.01)
    result = anarcho("doctor")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert result.stdout.count("ok") >= 3


def test_a_result_that_is_not_finite_fails_the_self_test() -> None:
    assert not selftest.Check(device="x", name="y", max_error=math.nan).passed
    assert not selftest.Check(device="x", name="y", max_error=math.inf).passed


def test_the_attention_reference_is_an_average_over_the_past() -> None:
    q = np.zeros((1, 1, 4, 2))
    v = np.arange(8.0).reshape(1, 1, 4, 2)
    expected = np.stack([v[0, 0, : index + 1].mean(axis=0) for index in range(4)])
    np.testing.assert_allclose(selftest.causal_attention(q, q, v)[0, 0], expected)


def test_instruction_sets_and_native_types_are_read_from_cpuinfo(tmp_path: Path) -> None:
    intel = tmp_path / "intel"
    intel.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16\n")
    features = diagnosis.cpu_features(intel)
    assert features == ["AVX2", "AVX-512", "AVX512-BF16", "AMX", "AMX-BF16"]
    assert diagnosis.native_dtypes(features) == ["float32", "bfloat16"]
    old = tmp_path / "old"
    old.write_text("flags : fpu sse2 avx2\n")
    assert diagnosis.native_dtypes(diagnosis.cpu_features(old)) == ["float32"]


def test_native_types_of_an_apple_processor_are_read_from_sysctl(tmp_path: Path) -> None:
    answers = {"hw.optional.arm.FEAT_BF16": "1", "hw.optional.arm.FEAT_FP16": "1"}
    assert diagnosis.native_dtypes(diagnosis.cpu_features(tmp_path / "absent", sysctl=answers.get)) == [
        "float32",
        "bfloat16",
        "float16",
    ]
    assert diagnosis.cpu_features(tmp_path / "absent", sysctl=lambda key: None) == []


def test_a_compiler_that_does_not_answer_is_not_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = diagnosis.compiler_facts(run=lambda command: None)
    assert silent["usable"] is False
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert diagnosis.compiler_facts() == {
        "path": None,
        "version": None,
        "python_headers": silent["python_headers"],
        "usable": False,
    }
