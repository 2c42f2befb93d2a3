"""`train.micro_batch = "auto"`: forecast, probe and decision, the journal's line, and a run that finds no memory at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from anarcho_cli.config import RunConfig, resolve
from anarcho_cli.fitting.budget import USED_SHARE, forecast_bytes, mlx_budget, torch_budget, with_size
from anarcho_cli.fitting.decision import Probed, agreed, find, kept
from anarcho_cli.fitting.probing import probe
from anarcho_cli.plan import plan_run
from anarcho_monitor import read_memory, read_metrics, read_system_memory
from anarcho_tokenize import embedded_documents
from anarcho_train import Alone, OutOfMemory

GIB = 2**30
PLACE = {"backend": "torch", "device": "cpu"}


def config_of(*overrides: str, preset: str = "medium-45m") -> RunConfig:
    return resolve(preset=preset, overrides=["train.micro_batch=auto", "train.precision=float32", *overrides])


def needs(config: RunConfig, size: int, *, checkpointing: bool = False, device: str = "cpu") -> int:
    return forecast_bytes(config, micro_batch=size, checkpointing=checkpointing, backend="torch", device=device)


def never(config: RunConfig, sizes: Sequence[int]) -> Probed:
    raise AssertionError("nothing is to be probed")


def test_far_below_the_budget_the_forecast_decides_and_no_more_is_taken_than_is_of_use():
    fit = find(config_of(), **PLACE, budget_bytes=1000 * GIB, probe=never)
    assert (fit.micro_batch, fit.gradient_checkpointing, fit.peaks) == (4, False, {})  # 4096 tokens.
    assert find(config_of(), backend="torch", device="cuda", budget_bytes=1000 * GIB, probe=never).micro_batch == 32
    short = config_of("train.sequence_length=96", "train.batch_tokens=2880")
    assert find(short, **PLACE, budget_bytes=1000 * GIB, probe=never).micro_batch == 30
    assert fit.applied(config_of()).batch_sequences == config_of().batch_sequences == 64
    assert "is far below the budget" in fit.event()["message"]


def test_near_the_budget_two_sizes_are_measured_and_the_largest_that_fits_is_taken():
    config, asked = config_of("train.batch_tokens=98304"), []

    def linear(config: RunConfig, sizes: Sequence[int]) -> Probed:
        asked.append(list(sizes))
        return Probed(peaks={size: (10 + size) * GIB for size in sizes})

    budget = int(needs(config, 12, device="cuda") / USED_SHARE) + 1
    fit = find(config, backend="torch", device="cuda", budget_bytes=budget, probe=linear)
    assert asked == [[8, 12]]
    assert fit.micro_batch == max(
        n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24) if n == 1 or 10 + n <= USED_SHARE * budget / GIB
    )
    assert fit.event()["probed_bytes"] == {"8": 18 * GIB, "12": 22 * GIB}


def test_what_the_probe_has_measured_outweighs_the_forecast():
    config = config_of()
    budget = int(needs(config, 2) / USED_SHARE) + 1
    half = lambda config, sizes: Probed(peaks={size: needs(config, size) // 2 for size in sizes})  # noqa: E731
    double = lambda config, sizes: Probed(peaks={size: needs(config, size) * 2 for size in sizes})  # noqa: E731
    assert find(config, **PLACE, budget_bytes=budget, probe=half).micro_batch == 4
    assert find(config, **PLACE, budget_bytes=budget, probe=double).micro_batch == 1


def test_a_probe_that_finds_no_memory_for_the_larger_size_settles_for_the_smaller():
    config = config_of()
    budget = int(needs(config, 4) / USED_SHARE) + 1

    def dies(config: RunConfig, sizes: Sequence[int]) -> Probed:
        return Probed(peaks={sizes[0]: needs(config, sizes[0])}, failure="the system ended it", out_of_memory=True)

    fit = find(config, **PLACE, budget_bytes=budget, probe=dies)
    assert (fit.micro_batch, fit.gradient_checkpointing) == (2, False)
    assert "the system ended it" in fit.reason
    broken = find(
        config, **PLACE, budget_bytes=budget, probe=lambda config, sizes: Probed(peaks={}, failure="no such device")
    )
    assert broken.micro_batch == 4  # As the forecast says.


def test_activations_are_computed_again_where_one_sequence_would_not_fit_otherwise():
    config = config_of("train.gradient_checkpointing=auto", preset="reference-137m")
    rich, poor = needs(config, 1), needs(config, 1, checkpointing=True)
    assert poor < rich
    measured = lambda config, sizes: Probed(  # noqa: E731
        peaks={n: needs(config, n, checkpointing=config.train.gradient_checkpointing is True) for n in sizes}
    )
    for budget, again in ((rich, False), ((rich + poor) // 2, True), (poor // 2, True)):
        fit = find(config, **PLACE, budget_bytes=int(budget / USED_SHARE) + 1, probe=measured)
        assert (fit.micro_batch, fit.gradient_checkpointing) == (1, again)
    # The forecast took the first for possible, and the probe did not.
    unlucky = lambda config, sizes: (  # noqa: E731
        measured(config, sizes)
        if config.train.gradient_checkpointing is True
        else Probed(peaks={}, failure="killed", out_of_memory=True)
    )
    assert find(config, **PLACE, budget_bytes=int(rich / USED_SHARE) + 1, probe=unlucky).gradient_checkpointing


def test_pairs_are_batched_alike_whatever_is_found():
    config = resolve(preset="preference", overrides=["train.micro_batch=auto", "train.batch_tokens=32768"])
    assert config.bucket_sequences * config.sequence_length == 4096
    fit = find(
        config, **PLACE, budget_bytes=2 * GIB, probe=lambda config, sizes: Probed(peaks=dict.fromkeys(sizes, 9 * GIB))
    )
    assert fit.micro_batch == 1
    assert fit.sequences == config.bucket_sequences


def test_an_earlier_attempt_s_size_is_kept_on_the_same_device_while_it_fits():
    config = config_of()
    fit = find(config, **PLACE, budget_bytes=1000 * GIB, probe=never)
    record = {**PLACE, **fit.facts()}
    again = kept(config, record, **PLACE, budget_bytes=900 * GIB)
    assert again is not None
    assert (again.micro_batch, again.gradient_checkpointing) == (4, False)
    assert kept(config, record, **PLACE, budget_bytes=fit.needed_bytes) is None
    assert kept(config, record, backend="torch", device="cuda", budget_bytes=900 * GIB) is None
    assert kept(config, {}, **PLACE, budget_bytes=900 * GIB) is None


def test_processes_agree_on_the_smallest_size():
    class Others(Alone):
        def gathered(self, values: Sequence[float]) -> Any:
            import numpy as np

            return np.array([values, [2, 1, 7.0]])

    fit = find(config_of(), **PLACE, budget_bytes=1000 * GIB, probe=never)
    both = agreed(fit, Others())
    assert both is not None
    assert (both.micro_batch, both.gradient_checkpointing) == (2, True)
    assert agreed(None, Others()) is None


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of 64 GiB of which 40 are free, and this process, of 1 GiB, in a control group of 8 GiB of which 3 are used."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{8 * GIB}\n")
    (group / "memory.current").write_text(f"{4 * GIB}\n")
    (group / "memory.stat").write_text(f"inactive_file {GIB}\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=40 * GIB))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB)))
    return read_system_memory(tmp_path)


def test_the_budget_is_what_device_container_and_machine_leave(container):
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (60 * GIB, 80 * GIB),
        memory_reserved=lambda device: 2 * GIB,
        memory_allocated=lambda device: GIB,
        max_memory_allocated=lambda device: GIB,
    )
    mps = SimpleNamespace(
        current_allocated_memory=lambda: 0, driver_allocated_memory=lambda: 0, recommended_max_memory=lambda: 5 * GIB
    )
    torch = SimpleNamespace(cuda=cuda, mps=mps)
    assert torch_budget(read_memory("cpu", system=container), own_memory=False) == 6 * GIB
    assert torch_budget(read_memory("cuda", framework=torch, system=container), own_memory=True) == 62 * GIB
    assert torch_budget(read_memory("mps", framework=torch, system=container), own_memory=False) == 5 * GIB
    information: dict[str, Any] = {"max_recommended_working_set_size": 4 * GIB}
    mlx = SimpleNamespace(
        get_active_memory=lambda: GIB,
        get_cache_memory=lambda: 0,
        get_peak_memory=lambda: 0,
        device_info=lambda: information,
    )
    reading = read_memory("mlx", framework=mlx, system=container)
    assert mlx_budget(reading, information, own_memory=False) == 4 * GIB
    assert mlx_budget(reading, {}, own_memory=False) == 6 * GIB
    assert mlx_budget(reading, {"total_memory": 80 * GIB, "free_memory": 9 * GIB}, own_memory=True) == 10 * GIB


FAKE = "import json, sys; order = json.load(sys.stdin); print(json.dumps({'size': order['sizes'][0], 'peak_bytes': 7}), flush=True)"


@pytest.mark.parametrize(
    ("ending", "failure", "out_of_memory"),
    [
        ("", "", False),
        ("; import os; os.kill(os.getpid(), 9)", "the system ended it", True),
        ("; print(json.dumps({'error': 'no memory', 'out_of_memory': True}))", "no memory", True),
        ("; raise ImportError('no torch')", "ImportError: no torch", False),
        ("; import time; time.sleep(60)", "it took longer than 3 s", False),
    ],
    ids=["whole", "killed", "out of memory", "broken", "late"],
)
def test_a_probe_s_end_takes_nothing_of_what_it_has_told(ending, failure, out_of_memory):
    command = (sys.executable, "-c", FAKE + ending)
    found = probe(config_of(), (1, 2), **PLACE, command=command, timeout_seconds=3 if "sleep" in ending else 60)
    assert found == Probed(peaks={1: 7}, failure=failure, out_of_memory=out_of_memory)


TINY = [
    "model.num_layers=1",
    "model.dim=64",
    "model.num_heads=1",
    "tokenizer.vocab_size=512",
    "train.sequence_length=64",
    "train.batch_tokens=2048",
]


def test_a_probe_measures_steps_without_8_bit_products_which_are_compiled():
    config = config_of(*TINY, "train.precision=auto", "train.compile=on", "train.float8=true")
    found = probe(config, (2,), **PLACE)
    assert (found.failure, list(found.peaks)) == ("", [2])


def test_a_probe_measures_whole_steps_of_pairs_in_a_process_of_its_own():
    pytest.importorskip("mlx.core")
    config = config_of(*TINY, preset="preference")
    place = {"backend": "mlx", "device": "cpu"}
    found = probe(with_size(config, micro_batch=4, checkpointing=False), (2, 16), **place)
    assert (found.failure, sorted(found.peaks)) == ("", [2, 16])
    assert found.peaks[16] > found.peaks[2] > 30 * 2**20
    for size, peak in found.peaks.items():
        assert peak < 1.2 * forecast_bytes(config, micro_batch=size, checkpointing=False, **place)


def test_a_plan_leaves_open_what_is_found_later_and_the_dry_run_forecasts_it(anarcho):
    assert plan_run(config_of(), device="cpu").config.train.micro_batch == 1
    shown = anarcho("pretrain", "--dry-run", "--json", "--set", "train.micro_batch=auto", "--device", "cpu")
    assert json.loads(shown.stdout)["micro_batch"] == 16


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.micro_batch=many", 'expected a whole number or one of "auto"'),
        ("train.micro_batch=0", "expected a whole number of at least 1"),
        ("train.gradient_checkpointing=perhaps", 'expected true or false or one of "auto"'),
    ],
)
def test_other_words_than_auto_are_refused(refused, setting, expected):
    assert expected in refused("pretrain", "--dry-run", "--set", setting)


SMALL = {
    "tokenizer.vocab_size": 400,
    "train.steps": 4,
    "train.batch_tokens": 1024,
    "train.eval_every": 0,
    "train.eval_tokens": 256,
    "train.checkpoint_every": 2,
    "sample.max_new_tokens": 2,
    "data.validation_fraction": 0.1,
}


def options(directory: Path, **values: Any) -> list[str]:
    texts = directory / "texts.jsonl"
    documents = [document for document in embedded_documents() if len(document) < 9000][:6]
    texts.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    chosen = SMALL | {key.replace("__", "."): value for key, value in values.items()}
    pairs = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    return ["pretrain", "--data", str(texts), "--device", "cpu", "--runs-dir", str(directory), "--name", "run", *pairs]


def test_a_run_says_what_it_found_and_one_without_memory_saves_its_state_and_ends_with_a_sentence(
    anarcho, tmp_path, monkeypatch
):
    from anarcho_train.steps.torch import TorchStep

    train, made = TorchStep.train, []

    def full(step: TorchStep, micro_batches: Any, **options: Any) -> Any:
        made.append(len(micro_batches[0].tokens))
        if len(made) > 3:
            raise OutOfMemory("DefaultCPUAllocator: can't allocate memory")
        return train(step, micro_batches, **options)

    monkeypatch.setattr(TorchStep, "train", full)
    result = anarcho(*options(tmp_path, train__micro_batch="auto", train__gradient_checkpointing="auto"))
    assert result.exit_code == 2
    assert "memory ran out in step 4 even with the smallest micro-batch" in result.stderr
    assert "try train.gradient_checkpointing" in result.stderr
    assert made == [4, 4, 4, 4, 2, 1]
    run = tmp_path / "run"
    records = read_metrics(run / "metrics.jsonl")
    assert [r["micro_batch"] for r in records if r["kind"] == "start"] == [4]
    assert "micro-batch 4 of 4 sequences" in next(r["message"] for r in records if r["kind"] == "event")
    assert [r["micro_batch_tokens"] for r in records if r.get("fault") == "memory"] == [512, 256]
    assert (run / "checkpoints" / "step-00000003").is_dir()
    monkeypatch.undo()
    assert anarcho("pretrain", "--resume", run, "--json").exit_code == 0
    last = [r for r in read_metrics(run / "metrics.jsonl") if r["attempt"] == 2]
    assert "as before" in next(r["message"] for r in last if r["kind"] == "event")
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["micro_batch"] == {"tokens": 256, "begun_with": 1024}
