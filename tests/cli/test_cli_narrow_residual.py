"""A residual stream in the type of the matrix products: what it changes, and that float32 has nothing to narrow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anarcho_cli.config import resolve
from anarcho_cli.plan import plan_run

SETTINGS = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 2,
    "model.dim": 32,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 16,
    "init.zero_residual_outputs": "false",
    "train.steps": 8,
    "train.batch_tokens": 128,
    "train.micro_batch": 8,
    "train.eval_every": 0,
    "train.compile": "off",
    "optim.warmup_steps": 1,
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_in_half_precision_it_learns_alike_and_in_float32_the_same(backend: str, tmp_path: Path, anarcho) -> None:
    pytest.importorskip("mlx.core" if backend == "mlx" else "torch")
    (tmp_path / "text.txt").write_text("The whale and the sea. " * 400)

    def loss(*, precision: str, narrow: bool) -> float:
        given = SETTINGS | {"train.precision": precision, "train.narrow_residual": str(narrow).lower()}
        options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        name = f"{precision}-{narrow}"
        place = ("--data", tmp_path / "text.txt", "--runs-dir", tmp_path / "runs", "--name", name)
        result = anarcho("pretrain", "--backend", backend, "--device", "cpu", *place, *options, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["validation_loss"]

    assert loss(precision="float32", narrow=True) == loss(precision="float32", narrow=False)
    wide, narrow = (loss(precision="bfloat16", narrow=narrow) for narrow in (False, True))
    assert wide != narrow
    assert wide == pytest.approx(narrow, rel=0.01)


def test_the_plan_knows_of_it() -> None:
    options = ["train.gradient_checkpointing=true", "train.precision=bfloat16"]
    wide, narrow = (
        plan_run(resolve(preset="small-15m", overrides=[*options, f"train.narrow_residual={value}"]), device="cpu")
        for value in ("false", "true")
    )
    assert narrow.memory.activations < wide.memory.activations
