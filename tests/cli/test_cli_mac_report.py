"""What fits which Mac, and the report of a Mac: the document's tables are the code's, and facts come from the system's own tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anarcho_cli.benching import machine
from anarcho_cli.benching.memory_table import (
    PRESETS,
    SIZES_GB,
    USED_SHARE,
    choice,
    forecast,
    largest_micro_batch,
    memory_table,
    working_set_bytes,
)
from anarcho_cli.benching.report import mac_report, remarks
from anarcho_cli.config import resolve

DOCUMENT = Path(__file__).parents[2] / "docs" / "apple-silicon.md"

MAC = {
    "mac": True,
    "chip": "Apple M1 Pro",
    "model": "MacBookPro18,3",
    "gpu_cores": 16,
    "memory_bytes": 16 * 2**30,
    "system": "macOS 26.1",
    "python": "3.12.1",
    "versions": {"anarcho-cli": "0.2.0", "torch": "2.11.0", "mlx": None},
}
TRAINING = {
    "kind": "training",
    "preset": "small-15m",
    "backend": "torch",
    "device": "mps",
    "micro_batch": 8,
    "context": 512,
    "flops_per_token": 100_000_000,
    "forecast_bytes": 2 * 2**30,
    "precision": "bfloat16",
    "compiled": False,
    "tokens_per_second": 10_400.0,
    "step_seconds": 3.2,
    "ceiling_flops": 4.0e12,
    "peak_flops": 5.2e12,
    "peak_bytes": 1.5 * 2**30,
}


def test_the_tables_of_the_document_are_what_the_command_prints(anarcho) -> None:
    if not DOCUMENT.is_file():
        pytest.skip("the package is tested without the repository's documents")
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = "<!-- memory table begins -->\n", "<!-- memory table ends -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == anarcho("bench", "--memory-table").stdout


def test_every_choice_fits_its_budget_and_the_next_larger_micro_batch_does_not() -> None:
    config = resolve(preset="medium-45m")
    for memory_gb in SIZES_GB:
        budget = int(working_set_bytes(memory_gb) * USED_SHARE)
        size = largest_micro_batch(config, budget_bytes=budget, checkpointing=False)
        assert size is not None
        assert forecast(config, micro_batch=size, checkpointing=False) <= budget
        if size < config.batch_sequences:
            assert forecast(config, micro_batch=2 * size, checkpointing=False) > budget
        assert choice(config, memory_gb=memory_gb).startswith(f"{size} (")


def test_presets_fit_from_16_gb_on_as_they_are_and_from_8_gb_on_with_checkpointing() -> None:
    for name in PRESETS:
        config = resolve(preset=name)
        for memory_gb, checkpointing in ((8, name == "reference-137m"), (16, False)):
            needed = forecast(config, micro_batch=config.train.micro_batch, checkpointing=checkpointing)
            assert needed <= working_set_bytes(memory_gb) * USED_SHARE, (name, memory_gb)


def test_a_mac_too_small_for_one_sequence_is_told_so() -> None:
    assert choice(resolve(preset="reference-137m"), memory_gb=1) == "does not fit"
    assert "does not fit" in memory_table(["reference-137m"], [2])


def test_the_report_of_a_mac_names_it_its_figures_and_where_they_go() -> None:
    failed = {**TRAINING, "preset": "reference-137m", "error": "left out: it needs 5.5 GiB"}
    text = mac_report([TRAINING, failed], MAC, steps=5)
    assert text.startswith("### Apple M1 Pro (MacBookPro18,3), 16 GPU cores, 16.0 GiB, macOS 26.1")
    assert "anarcho-cli 0.2.0, torch 2.11.0; medians of 5 steps" in text
    row = "| small-15m | torch mps | 8 x 512 | bfloat16 | 10,400 | 3.2 s | 26% | 20% | 1.5 GiB | 2.0 GiB |"
    assert row in text
    assert "* training of reference-137m on torch mps: left out: it needs 5.5 GiB" in text
    assert "open an issue of the AnarchoBot project" in text
    assert "http" not in text


def test_a_chip_without_a_published_peak_has_an_empty_cell_and_no_guess() -> None:
    text = mac_report([{**TRAINING, "peak_flops": None}], MAC, steps=5)
    assert "| 26% |  | 1.5 GiB |" in text


def test_figures_of_a_computation_that_went_wrong_are_marked() -> None:
    assert remarks([{**TRAINING, "finite": True}]) == []
    (line,) = remarks([{**TRAINING, "finite": False}])
    assert line.startswith("training of small-15m on torch mps: the loss was not finite")


def test_elsewhere_the_report_says_that_it_is_of_no_mac_and_is_not_to_be_sent() -> None:
    text = mac_report([TRAINING], {**MAC, "mac": False}, steps=5)
    assert "This is no Mac" in text
    assert "open an issue" not in text


def test_the_report_is_printed_on_any_machine_and_says_what_it_is(anarcho) -> None:
    options = ["--preset", "quickstart", "--only", "training", "--backend", "torch", "--device", "cpu"]
    result = anarcho("bench", "--mac-report", "--timeout", 1, *options)  # which is too short for any measurement
    assert "### " in result.stdout
    assert "* training of quickstart on torch cpu: it did not end within 1 s" in result.stdout
    if not machine.is_apple_silicon():
        assert "this is no Mac with an Apple chip" in result.stderr


def test_facts_of_a_mac_come_from_sysctl_and_system_profiler(tmp_path: Path) -> None:
    displays = {"SPDisplaysDataType": [{"_name": "Display"}, {"sppci_cores": "38", "sppci_model": "Apple M2 Max"}]}
    answers = {
        "machdep.cpu.brand_string": "Apple M2 Max\n",
        "hw.model": "Mac14,6\n",
        "SPDisplaysDataType": json.dumps(displays),
    }
    facts = machine.read_facts(run=lambda command: answers.get(command[-1]), apple=True, cpuinfo=tmp_path)
    assert (facts["chip"], facts["model"], facts["gpu_cores"]) == ("Apple M2 Max", "Mac14,6", 38)
    silent = machine.read_facts(run=lambda command: None, apple=True, cpuinfo=tmp_path)
    assert (silent["model"], silent["gpu_cores"]) == (None, None)
    assert silent["chip"]


def test_the_chip_of_a_linux_machine_is_its_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some Processor 9000\n")
    facts = machine.read_facts(run=lambda command: None, apple=False, cpuinfo=cpuinfo)
    assert facts["mac"] is False
    assert facts["gpu_cores"] is None
    if machine.platform.system() != "Darwin":
        assert facts["chip"] == "Some Processor 9000"
