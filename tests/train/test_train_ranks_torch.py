"""Several PyTorch processes make the update of one, be the model whole in each or in shards, agree on memory that runs out in one of them,
and never wait for ever."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch knows one process alone"),
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked, which Metal does not allow"),
]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "anarcho_train.steps.torch",
        "anarcho_train.steps.torch_shards",
        "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
        "torch._dynamo",
    ]
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """What each rank left, by (how many there were, its number): of one process alone, of two and of four."""
    directory = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("torch_rank.py"))
    all_ranks = [(rank, size) for size in (1, 2, 4) for rank in range(size)]
    processes = [
        SERVER.Process(target=runpy.run_path, args=(script, {"TOLD": (rank, size, str(directory))}, "__torch_rank__"))
        for rank, size in all_ranks
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0
    return {(size, rank): json.loads((directory / f"rank-{size}-{rank}.json").read_text()) for rank, size in all_ranks}


def steps(outcome: Any) -> list[Any]:
    return [found for found in outcome["trained"]["steps"] if isinstance(found, dict)]


def test_two_ranks_make_the_updates_of_one_skipped_steps_included(outcomes):
    alone, first, second = outcomes[1, 0], outcomes[2, 0], outcomes[2, 1]
    assert repr(first["trained"]["weights"]) == repr(second["trained"]["weights"])
    assert repr(steps(first)) == repr(steps(second))
    assert [found["skipped"] for found in steps(first)] == [False, False, True, False]
    for ours, theirs in zip(steps(first), steps(alone), strict=True):
        for name in ("loss", "weight", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, nan_ok=True), name
        assert ours["update_ratios"] == pytest.approx(theirs["update_ratios"], rel=1e-4)
    assert first["trained"]["weights"] == pytest.approx(alone["trained"]["weights"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("held", [True, False])
def test_four_ranks_with_shards_of_a_model_or_of_its_replicas_make_the_updates_of_one(outcomes, replicas, held):
    """Gradients are held whole between micro-batches, or shared out within a replica each time; a sum over shards counts none twice."""
    alone, found = outcomes[1, 0]["unbroken"], outcomes[4, 0][f"{replicas}-{held}"]
    for ours, theirs in zip(found["steps"], alone["steps"], strict=True):
        for name in ("loss", "weight", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert ours["update_ratios"] == pytest.approx(theirs["update_ratios"], rel=2e-2), "of a sample of the weights"
    assert found["steps"][1]["update_ratios"]
    assert found["counted"] == alone["counted"]
    assert found["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("held", [True, False])
def test_memory_that_runs_out_in_one_rank_with_shards_is_known_to_all_wherever_it_did(outcomes, replicas, held):
    """In the first or last micro-batch, between what is gathered in forward or shared out in backward; the steps after it are compared."""
    told = [outcomes[4, rank][f"{replicas}-{held}"]["told"] for rank in range(4)]
    assert told[:3] == [["another process of the run, torn False"] * 4] * 3
    assert all(found.startswith("DefaultCPUAllocator: can't allocate memory") for found in told[3])


def test_shards_of_a_model_in_bfloat16_gather_its_matrices_in_it_and_sum_gradients_in_float32(outcomes):
    alone, found = outcomes[1, 0]["bfloat16"], outcomes[4, 0]["bfloat16"]
    for ours, theirs in zip(found["steps"], alone["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    whole, narrow = found["sent"]["float32"], found["sent"]["bfloat16"]
    assert whole["reduce"] == narrow["reduce"] > 0
    assert 0.5 <= narrow["gather"] / whole["gather"] < 0.65
    assert found["types"] == ["torch.float32"], "what the optimizer updates"


def test_memory_that_runs_out_in_one_rank_is_known_to_both_and_the_step_can_be_tried_again(outcomes):
    told, failed = (
        [found for found in outcomes[2, rank]["trained"]["steps"] if isinstance(found, str)] for rank in (0, 1)
    )
    assert told == ["another process of the run, torn False"] * 2, "in the forward and in the last backward pass"
    assert all(found.startswith("DefaultCPUAllocator: can't allocate memory") for found in failed)
    assert all(found.endswith("torn False") for found in failed)


def test_what_a_rank_waits_for_a_slow_one_is_not_among_its_own_seconds(outcomes):
    fast, slow = (outcomes[2, rank]["slowness"][1:] for rank in (0, 1))  # The first step makes what later ones have.
    assert min(fast) < 0.5 * min(slow), "it has waited for the slow one's backward pass in every step"


def test_an_exchange_without_an_answer_ends_after_the_timeout_and_every_later_one_at_once(outcomes):
    found = outcomes[2, 0]["silence"]
    assert len(found["messages"]) == 2
    assert "it did not answer for 1 seconds" in found["messages"][0]
    assert found["messages"][1] == found["messages"][0]
    assert found["seconds"] < 3
