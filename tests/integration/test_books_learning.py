"""The benchmark of learning computes bits per byte as they are defined, and a job's result is its own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.torch import GPT
from anarcho_tokenize import Tokenizer, TokenizerConfig, embedded_documents, train_tokenizer

ROOT = Path(__file__).parents[2]
CONTEXT = 16
SHAPE = ["--layers", "1", "--dim", "32", "--heads", "2", "--context", str(CONTEXT)]
HOW = ["--precision", "float32", "--evaluations", "2", "--windows", "4"]
COMMON = "micro_tokens=64 tokens_per_step=128 warmup_steps=2 lr=0.01"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text[:3000] for text, _ in zip(embedded_documents(), range(6), strict=False)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, config=TokenizerConfig(vocab_size=400))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> Path:
    """A folder that `prepare` has written, of four texts to train on and two to validate on."""
    folder = tmp_path_factory.mktemp("books")
    for name, part in {"train": texts[:4], "validation": texts[4:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part), "utf-8")
    tokenizer.save(folder / "tokenizer")
    sources = [f"--{name}={folder / file}" for name, file in SOURCES.items()]
    _main("prepare", *sources, f"--folder={folder / 'data'}", "--compress")
    return folder / "data"


SOURCES = {"train": "train.jsonl", "validation": "validation.jsonl", "tokenizer": "tokenizer"}


def _main(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(sys, "argv", ["books_learning.py", *arguments])
        import books_learning

        try:
            books_learning.main()
        except SystemExit as end:
            assert end.code == 0  # noqa: PT017 - the command ends so where all jobs have been done


def _train(data: Path, output: Path, *jobs: str, tokens: int | None = None) -> list[dict[str, Any]]:
    given = [part for job in jobs for part in ("--job", job)] + ([f"--tokens={tokens}"] if tokens else [])
    _main("train", f"--data={data}", f"--output={output}", "--common", COMMON, *SHAPE, *HOW, *given)
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_compressed_files_hold_the_same_tokens(data: Path) -> None:
    sources = [f"--{name}={data.parent / file}" for name, file in SOURCES.items()]
    plain = data.parent / "plain"
    _main("prepare", *sources, f"--folder={plain}")
    from books.data import load

    for part in ("train", "validation"):
        one, other = (getattr(load(folder), part) for folder in (data, plain))
        assert (one.num_tokens, one.num_bytes) == (other.num_tokens, other.num_bytes)
        pairs = zip(one.batches(4, length=CONTEXT), other.batches(4, length=CONTEXT), strict=True)
        assert all((a.tokens == b.tokens).all() and (a.targets == b.targets).all() for a, b in pairs)


def test_bits_per_byte_are_the_information_of_all_tokens_over_the_bytes_of_the_texts(
    data: Path, tmp_path: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    """Against a plain sum over windows that do not overlap, with weights that as good as no learning rate has left as they were."""
    still = "still lr=1e-12 embedding_std=0.3 zero_residual_outputs=false"
    found = _train(data, tmp_path / "records.jsonl", still, tokens=512)[-1]
    model = GPT(ModelConfig(vocab_size=tokenizer.vocab_size, context_length=CONTEXT, num_layers=1, dim=32, num_heads=2))
    model.init_weights(seed=0, init=InitConfig(embedding_std=0.3, zero_residual_outputs=False))
    ids = [tokenizer.eot_id]
    for text in texts[4:]:
        ids += [*tokenizer.encode(text), tokenizer.eot_id]
    bits = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.tensor(ids[start : start + CONTEXT + 1])
        with torch.no_grad():
            logprobs = model(window[None, :-1])[0].log_softmax(-1)
        bits -= logprobs[torch.arange(len(window) - 1), window[1:]].sum().item() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts[4:])
    assert found["kind"] == "end"
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_job_learns_and_learns_the_same_alone_and_after_others(data: Path, tmp_path: Path) -> None:
    job = "same qk_norm=true averages=0,8 rates=v_proj:0.7 beta2s=embed:0.99 gains=model.norm:0.5 per_head=true"
    other = "other qk_norm=true seed=1 normuon=true tokens_per_step=64,128@0.5 length=8,16@0.5 momentum_cooldown=0.2"
    alone = _train(data, tmp_path / "alone.jsonl", job, tokens=2048)
    after = _train(data, tmp_path / "after.jsonl", other, job, tokens=2048)

    def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records if r["job"] == "same"]

    assert numbers(alone) == numbers(after)
    first, end = alone[1], alone[-1]
    assert (end["kind"], end["steps"], end["tokens"]) == ("end", 16, 2048)
    assert end["bits_per_byte"] < first["bits_per_byte"]
    assert end["averaged"].keys() == {"0", "8"}
    assert end["averaged"]["0"] > end["averaged"]["8"]  # early weights are no good


def test_peers_train_on_the_same_steps_and_the_curves_show_all(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    jobs = ["ours", "adamw peer=adamw lr=0.01", "muon peer=torch-muon lr=0.01"]
    records = _train(data, tmp_path / "records.jsonl", *jobs, tokens=2048)
    ends = [r for r in records if r["kind"] == "end"]
    assert {(r["steps"], r["tokens"]) for r in ends} == {(16, 2048)}
    assert len({r["parameters"] for r in ends}) == 1
    for name in ("ours", "adamw", "muon"):
        curve = [r["bits_per_byte"] for r in records if r["job"] == name and r["kind"] == "evaluation"]
        assert curve[-1] < curve[0]
    pictures = [tmp_path / f"{number}.svg" for number in (1, 2)]
    for picture in pictures:
        _main(
            "plot",
            str(tmp_path / "records.jsonl"),
            f"--picture={picture}",
            "--label=ours=this project",
            "--label=adamw=A",
        )
    drawn = pictures[0].read_text("utf-8")
    assert drawn == pictures[1].read_text("utf-8")
    assert "this project" in drawn
    assert "muon" not in drawn
