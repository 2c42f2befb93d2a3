"""Training sequences that grow: the same in both frameworks, isolated documents included, and where they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from anarcho_cli.config import resolve

SETTINGS = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 32,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 32,
    "train.steps": 6,
    "train.batch_tokens": 128,
    "train.micro_batch": 2,
    "train.length_warmup": 0.5,
    "train.first_length": 4,
    "train.eval_every": 0,
    "train.log_every": 1,
    "train.precision": "float32",
    "train.compile": "off",
    "optim.warmup_steps": 1,
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}


@pytest.mark.parametrize("isolated", ["false", "true"])
def test_both_frameworks_learn_the_same_from_it(isolated: str, tmp_path: Path, anarcho) -> None:
    pytest.importorskip("mlx.core")
    (tmp_path / "text.txt").write_text("\n\n".join(f"The whale {n} and the sea." for n in range(300)))

    def result(backend: str, **changes: object) -> dict:
        given = SETTINGS | {"data.isolate_documents": isolated} | changes
        options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        place = (
            "--data",
            tmp_path / "text.txt",
            "--runs-dir",
            tmp_path / "runs",
            "--name",
            f"{backend}-{len(changes)}",
        )
        done = anarcho("pretrain", "--backend", backend, "--device", "cpu", *place, *options, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    torch, mlx = result("torch"), result("mlx")
    assert torch["tokens"] == mlx["tokens"] == 6 * 128
    assert torch["validation_loss"] == pytest.approx(mlx["validation_loss"], rel=1e-4)
    whole = result("torch", **{"train.length_warmup": 0})
    assert whole["validation_loss"] != torch["validation_loss"]
    lines = (tmp_path / "runs" / "torch-0" / "metrics.jsonl").read_text().splitlines()
    told = [
        record["message"] for record in map(json.loads, lines) if "tokens from here on" in record.get("message", "")
    ]
    assert told == [f"sequences have {n} tokens from here on" for n in (4, 8, 16, 32)]


def test_what_cannot_grow_is_refused_by_its_key() -> None:
    with pytest.raises(
        ValueError, match=r"train\.first_length is 100, .* sequences of 256 tokens; expected one of 128, 64"
    ):
        resolve(preset="quickstart", overrides=["train.length_warmup=0.5", "train.first_length=100"])
    with pytest.raises(ValueError, match=r"train\.length_warmup is 0\.5, but data\.kind is 'chat'; expected 0"):
        resolve(preset="sft", overrides=["train.length_warmup=0.5"])
    with pytest.raises(ValueError, match=r"train\.length_warmup is 2\.0; expected a share"):
        resolve(preset="quickstart", overrides=["train.length_warmup=2.0"])
