"""Memory that runs out at any moment of a step, in the words of every device, ends in the weights of a run with smaller micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_train import OutOfMemory, PreferenceConfig, StepSchedule
from anarcho_train.losses.torch_preference import PreferenceLoss
from anarcho_train.out_of_memory import guarded, is_out_of_memory

from .conftest import Bigram, CountingText, make_step
from .test_train_preference import Buckets

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
MPS = RuntimeError(
    "MPS backend out of memory (MPS allocated: 5.50 GB, other allocations: 14.76 GB, max allowed: 20.40 GB). Tried to allocate 147.24 MB "
    "on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory allocations (may cause system failure)."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 "
    "bytes. Error code 12 (Cannot allocate memory)"
)
METAL = RuntimeError(
    "[metal::malloc] Attempting to allocate 30064771072 bytes which is greater than the maximum allowed buffer size of 22613000192 bytes."
)
LIMIT = RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")
MLX = RuntimeError("[malloc] Unable to allocate 4294967296 bytes.")
COMMAND = RuntimeError(
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
MLX_CUDA = RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")
MOMENTS = ("forward", "backward", "optimizer", "evaluation")


class Fails:
    """Raises once so many calls were made, for batches of more than so many rows."""

    def __init__(self, error: BaseException, *, after: int, rows: int = 2) -> None:
        self.error, self.after, self.rows, self.raised = error, after, rows, 0

    def __call__(self, rows: int) -> None:
        self.after -= 1
        if self.after < 0 and rows > self.rows:
            self.raised += 1
            raise self.error


def inject_torch(step: Any, moment: str, fails: Fails) -> None:
    if moment in ("forward", "backward", "evaluation"):
        inner = step._passes.logprobs

        class Late(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                fails(len(gradient))
                return gradient

        def logprobs(tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            if torch.is_grad_enabled() == (moment == "forward") and moment != "backward":
                torch.rand(3)  # Random numbers of what is dropped are drawn again.
                fails(len(tokens))
            return Late.apply(inner(tokens, *rest, **named)) if moment == "backward" else inner(tokens, *rest, **named)

        step._passes.logprobs = logprobs
        return
    update = step.optimizer.step

    def half(*arguments: Any) -> Any:
        try:
            fails(99)
        except BaseException:
            with torch.no_grad():
                next(iter(step.model.parameters())).add_(1)  # Half of the update is done.
            fails.after = 10**6  # Other programs have gone.
            raise
        return update(*arguments)

    step.optimizer.step = half


def first_weights(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    model.load_state_dict(Bigram().state_dict())


def torch_loop(make_loop: Callable, directory: Path, **settings: Any) -> SimpleNamespace:
    step = make_step()
    step._begin = first_weights
    return make_loop(directory, step=step, **settings)


def weights(run: SimpleNamespace) -> list[torch.Tensor]:
    return list(run.loop.step.model.parameters())


SHORT = {"steps": 6, "eval_every": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def small_weights() -> list[torch.Tensor]:
    """The weights after six steps of micro-batches of two sequences from the beginning."""
    step, text = make_step(), CountingText()
    for number in range(6):
        batches = [text.rows(range(first, first + 2)) for first in range(8 * number, 8 * number + 8, 2)]
        step.train(batches, schedule=StepSchedule(lr_scale=1 - number / 24))
    return list(step.model.parameters())


@pytest.mark.parametrize(
    ("moment", "error", "after"),
    [
        *[(moment, error, 4) for error in (CUDA, MPS, CPU) for moment in MOMENTS],
        *[(moment, MPS, 0) for moment in ("forward", "optimizer")],
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:8],
)
def test_a_run_that_finds_no_memory_ends_with_the_weights_of_smaller_micro_batches(
    make_loop, small_weights, tmp_path, moment, error, after
):
    run = torch_loop(make_loop, tmp_path, micro_batch=8, **SHORT)
    fails = Fails(error, after=after // 4 if moment == "evaluation" else after)
    inject_torch(run.loop.step, moment, fails)
    state = torch.get_rng_state()
    result = run.loop.run()
    assert fails.raised >= 1
    assert torch.equal(torch.get_rng_state(), state) or moment in ("forward", "evaluation")
    assert result.step == 6
    assert result.tokens == 6 * 8 * 4
    for own, other in zip(weights(run), small_weights, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    events = [line for line in run.sink.of("event") if line.get("fault") == "memory"]
    assert "out of memory" in events[0]["message"]
    assert events[0]["micro_batch_tokens"] == 4 * 4
    assert run.store.read_state(result.checkpoint)["micro_batch"]["tokens"] == (4 if moment == "optimizer" else 2) * 4
    assert ("rolled_back_to" in events[-1]) == (moment == "optimizer")
    assert set(run.text.consumed) == set(range(6 * 8))


def test_a_resumed_run_keeps_the_smaller_size(make_loop, tmp_path):
    run = torch_loop(make_loop, tmp_path / "run", micro_batch=8, steps=6)
    inject_torch(run.loop.step, "forward", Fails(MPS, after=2))
    run.loop.run()
    again = torch_loop(make_loop, tmp_path / "run", micro_batch=8, steps=12)
    again.loop.resume(again.store.latest_valid())
    assert again.loop.micro_batch == "2 of 8 sequences"


def test_without_memory_for_one_sequence_the_state_is_saved_and_one_sentence_says_what_to_do(make_loop, tmp_path):
    run = torch_loop(make_loop, tmp_path / "run", micro_batch=4, checkpoint_every=0, eval_every=0)
    inject_torch(run.loop.step, "forward", Fails(MPS, after=9, rows=0))
    with pytest.raises(
        OutOfMemory, match=r"memory ran out in step 5 .*smallest micro-batch .*train.gradient_checkpointing"
    ):
        run.loop.run()
    assert run.store.read_state(run.store.latest_valid())["step"] == 4


def test_batches_of_pairs_are_parted_between_pairs(make_loop, tmp_path):
    def build(directory: Path) -> SimpleNamespace:
        torch.manual_seed(0)
        step = make_step(Bigram(), loss=PreferenceLoss(PreferenceConfig()))
        torch.manual_seed(0)
        run = make_loop(directory, step=step, steps=9, micro_batch=4)
        run.loop.samples_per_step = 2
        run.loop.batches = run.loop.validation = Buckets(make_step(Bigram()).answer_logprobs)
        run.loop.__post_init__()
        return run

    whole, parted = build(tmp_path / "whole"), build(tmp_path / "parted")
    inject_torch(parted.loop.step, "backward", Fails(CUDA, after=5))
    expected, result = whole.loop.run(), parted.loop.run()
    for own, other in zip(weights(parted), weights(whole), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    assert parted.loop.micro_batch.startswith("at most ")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("error", [METAL, COMMAND], ids=["malloc", "command"])
def test_a_run_in_mlx_that_finds_no_memory_ends_with_the_weights_of_smaller_micro_batches(
    make_loop, tmp_path, error, moment
):
    pytest.importorskip("mlx.core")
    import mlx.core as mx

    from . import mlx_bigram

    def build(directory: Path, micro_batch: int) -> SimpleNamespace:
        step = mlx_bigram.make_step()
        first = {name: mx.array(value) for name, value in mlx_bigram.flat(step.model.parameters()).items()}
        step._begin = lambda model: model.load_weights(list(first.items())) and None
        return make_loop(directory, step=step, micro_batch=micro_batch, **SHORT)

    run = build(tmp_path, 8)
    fails, step = Fails(error, after=1 if moment == "evaluation" else 3), run.loop.step
    name = "logprobs" if moment == "evaluation" else "gradients"
    inner = step._functions[name]

    def function(inputs: dict[str, Any], *rest: Any) -> Any:
        if moment == "forward":
            mx.random.uniform(shape=(3,))
        if moment in ("forward", "evaluation"):
            fails(len(inputs["tokens"]))
        found = inner(inputs, *rest)
        if moment == "backward":
            mx.eval(found)
            fails(len(inputs["tokens"]))
        return found

    if moment == "optimizer":
        evaluate = mx.async_eval

        def async_eval(*trees: Any) -> None:
            if step._updating:
                try:
                    fails(99)
                except BaseException:
                    evaluate(mlx_bigram.flat(step.model.parameters()).popitem()[1])
                    fails.after = 10**6
                    raise
            evaluate(*trees)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "async_eval", async_eval)
            result = run.loop.run()
    else:
        step._functions = {**step._functions, name: function}
        result = run.loop.run()
    assert fails.raised >= 1
    assert result.step == 6
    small = mlx_bigram.make_step()
    for number in range(6):
        batches = [run.text.rows(range(first, first + 2)) for first in range(8 * number, 8 * number + 8, 2)]
        small.train(batches, schedule=StepSchedule(lr_scale=1 - number / 24))
    expected = mlx_bigram.flat(small.model.parameters())
    for parameter, value in mlx_bigram.flat(step.model.parameters()).items():
        np.testing.assert_allclose(np.array(value), np.array(expected[parameter]), atol=1e-5, rtol=0)


def test_processes_of_a_run_find_together_that_one_of_them_has_no_memory():
    pytest.importorskip("mlx.core")
    from anarcho_train.steps.agreement import agreed_memory

    def ranks(*failed: float) -> Any:
        return SimpleNamespace(size=2, gathered=lambda values: np.array([values, failed]))

    with agreed_memory(ranks(0.0)):
        pass
    with pytest.raises(OutOfMemory, match="another process of the run"), agreed_memory(ranks(1.0)):
        pass
    with pytest.raises(OutOfMemory, match="Resource limit"), agreed_memory(ranks(0.0)):
        raise LIMIT
    with pytest.raises(KeyError), agreed_memory(ranks(0.0)):
        raise KeyError


def test_without_a_checkpoint_and_its_first_weights_a_torn_update_ends_the_run_with_a_sentence(make_loop, tmp_path):
    run = make_loop(tmp_path, step=make_step(), micro_batch=8, **SHORT)
    inject_torch(run.loop.step, "optimizer", Fails(CUDA, after=1))
    with pytest.raises(ValueError, match="with which weights the training began"):
        run.loop.run()


@pytest.mark.parametrize(
    "error", [CUDA, MPS, CPU, METAL, LIMIT, MLX, COMMAND, MLX_CUDA, MemoryError()], ids=lambda e: str(e)[:20]
)
def test_every_framework_s_words_for_no_memory_are_understood(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("CUDA out of memory"), KeyError("MPS")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)):
        guarded(lambda: (_ for _ in ()).throw(error), recover=lambda: pytest.fail("nothing is to be recovered"))


def test_what_was_computed_is_free_before_it_is_tried_again():
    alive: list[int] = []

    class Large:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def work() -> None:
        activations = Large()
        raise MPS.with_traceback(None) if activations else AssertionError

    with pytest.raises(OutOfMemory, match="MPS backend out of memory"):
        guarded(work, recover=lambda: bool(alive))
    assert alive == []


class Wide(Bigram):
    """Keeps several times 8 MiB for each row."""

    def token_logprobs(self, tokens: torch.Tensor, targets: torch.Tensor, **_: Any) -> torch.Tensor:
        logprobs = super().token_logprobs(tokens, targets)
        return logprobs + (logprobs[:, :1, None].expand(-1, 1, 2**21) * 1e-9).sigmoid().mean(-1)


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process's memory is limited by rlimit")
def test_memory_that_really_runs_out_is_found_in_smaller_micro_batches(make_loop, tmp_path):
    import resource

    def build(directory: Path, micro_batch: int) -> SimpleNamespace:
        torch.manual_seed(0)
        settings = {"steps": 1, "eval_every": 0, "checkpoint_every": 0}
        return make_loop(directory, step=make_step(Wide()), micro_batch=micro_batch, **settings)

    small, run = build(tmp_path / "small", 2), build(tmp_path / "run", 8)
    small.loop.run()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + 90 * 2**20, limits[1]))  # Eight rows take 64 MiB more than once.
    try:
        run.loop.run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    events = [line["message"] for line in run.sink.of("event")]
    assert "DefaultCPUAllocator: can't allocate memory" in events[0]
    for own, other in zip(weights(run), weights(small), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
