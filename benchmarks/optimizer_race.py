"""Steps to a validation loss on the embedded corpus: AdamW, torch.optim.Muon and anarcho-optim, tuned alike, five seeds each.

    python benchmarks/optimizer_race.py --device cuda --workers 15 benchmarks/optimizer_race.jsonl
    python benchmarks/optimizer_race.py --plot packages/anarcho-optim/docs/race.svg benchmarks/optimizer_race.jsonl

Every contestant trains the same 4 x 192 Llama-like model (vocabulary 4096, context 256, 4096 tokens a step) from the same initial weights
on the same batches, under the same linear warm-up and linear decay over 400 steps. Its two hyper-parameters are chosen from a grid of the
same size by the final validation loss of seed 0; the winner runs with seeds 1 to 5. The mark is the median final loss of AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STEPS, WARMUP, EVERY = 400, 20, 10
LENGTH, BATCH, VALIDATION, VOCABULARY = 256, 16, 96, 4096
SEEDS = (1, 2, 3, 4, 5)
MUON_GRID = {"lr": (0.0025, 0.005, 0.01, 0.02), "adamw_lr": (0.004, 0.012)}
GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "torch.optim.AdamW": {"lr": (0.002, 0.004, 0.008, 0.016), "weight_decay": (0.01, 0.1)},
    "torch.optim.Muon + AdamW": MUON_GRID,
    "anarcho-optim": MUON_GRID,
    "anarcho-optim, NorMuon": MUON_GRID,
}
"""Contestants and the values that each of their two hyper-parameters may take."""


def make_optimizers(name: str, model: Any, settings: dict[str, float]) -> list[Any]:
    import torch
    from anarcho_optim import OptimConfig
    from anarcho_optim.torch import MuonAdamW, param_groups

    if name == "torch.optim.AdamW":
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95), fused=True)]
    config = OptimConfig(lr=settings["lr"], adamw_lr=settings["adamw_lr"], normuon=name.endswith("NorMuon"))
    routed = param_groups(model, config=config)
    if name.startswith("anarcho"):
        return [MuonAdamW(routed)]
    matrices = [p for group in routed if group["algorithm"] == "muon" for _, p in group["params"]]
    rest = [p for group in routed if group["algorithm"] == "adamw" for _, p in group["params"]]
    muon = torch.optim.Muon(matrices, lr=settings["lr"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=settings["adamw_lr"], betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    return [muon, adamw]


def train(name: str, settings: dict[str, float], seed: int, *, device: str, data: Path) -> dict[str, Any]:
    """One training; its validation losses in nats per token, by step."""
    import torch
    from anarcho_model import InitConfig, ModelConfig
    from anarcho_model.torch import GPT
    from anarcho_optim import schedules
    from anarcho_tokenize import PackedBatches, SequentialBatches, TokenShards

    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=VOCABULARY, context_length=LENGTH, num_layers=4, dim=192, num_heads=3, hidden_dim=512
    )
    model = GPT(config)
    model.init_weights(seed=seed, init=InitConfig())
    model.to(device)
    optimizers = make_optimizers(name, model, settings)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    batches = PackedBatches(TokenShards.open(data / "train"), length=LENGTH, seed=seed)
    validation = next(SequentialBatches(TokenShards.open(data / "validation"), length=LENGTH).batches(VALIDATION))

    def loss_of(batch: Any) -> Any:
        arrays = (torch.from_numpy(a).to(device) for a in (batch.tokens, batch.targets, batch.weights))
        tokens, targets, weights = arrays
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logprobs = model.token_logprobs(tokens.long(), targets.long())
        return -(logprobs * weights).sum() / weights.sum()

    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                curve.append((step, round(loss_of(validation).item(), 4)))
        if step == STEPS:
            break
        factor = schedules.linear(step, total_steps=STEPS, warmup_steps=WARMUP)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        loss_of(batches.batch(step * BATCH, BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {"optimizer": name, "settings": settings, "seed": seed, "curve": curve}


def race(device: str, workers: int) -> list[dict[str, Any]]:
    """The grid with seed 0, then every contestant's best settings with the other seeds."""
    from anarcho_tokenize import TokenizerConfig, embedded_documents, train_tokenizer, write_shards

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shards"
        tokenizer = train_tokenizer(embedded_documents(), config=TokenizerConfig(vocab_size=VOCABULARY))
        write_shards(embedded_documents(), tokenizer, data)
        # Processes start afresh: a forked one could not use the GPU.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            grid = [
                pool.submit(train, name, dict(zip(axes, values, strict=True)), 0, device=device, data=data)
                for name, axes in GRIDS.items()
                for values in itertools.product(*axes.values())
            ]
            rows = [job.result() for job in grid]
            best = {name: min(_of(rows, name), key=lambda row: row["curve"][-1][1])["settings"] for name in GRIDS}
            finals = [
                pool.submit(train, name, best[name], seed, device=device, data=data) for name in GRIDS for seed in SEEDS
            ]
            return rows + [job.result() for job in finals]


def _of(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["optimizer"] == name]


def steps_to(curve: list[tuple[int, float]], mark: float) -> float:
    """The step at which a curve first falls to ``mark``, interpolated between evaluations; infinity if it never does."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= mark:
            return before + (after - before) * (high - mark) / max(high - low, 1e-9)
    return float("inf")


def summarise(rows: list[dict[str, Any]]) -> tuple[float, dict[str, dict[str, Any]]]:
    """The mark and, per contestant, its settings, final losses and steps to the mark over the seeds."""
    finals = {name: [row for row in _of(rows, name) if row["seed"] in SEEDS] for name in GRIDS}
    mark = statistics.median(row["curve"][-1][1] for row in finals["torch.optim.AdamW"])
    table = {}
    for name, runs in finals.items():
        steps = sorted(steps_to(run["curve"], mark) for run in runs)
        losses = sorted(run["curve"][-1][1] for run in runs)
        table[name] = {"settings": runs[0]["settings"], "steps": steps, "losses": losses, "runs": runs}
    return mark, table


def print_table(rows: list[dict[str, Any]]) -> None:
    mark, table = summarise(rows)
    print(f"Steps to a validation loss of {mark:.3f} nats per token (the median final loss of AdamW), five seeds:\n")
    print("| | settings | steps: median (range) | final loss: median (range) |\n|---|---|---|---|")
    for name, row in table.items():
        settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
        spread = [
            f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
            for values, form in ((row["steps"], ".0f"), (row["losses"], ".3f"))
        ]
        print(f"| {name} | {settings} | {spread[0]} | {spread[1]} |")


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Median validation loss by step with the range over the seeds, and the mark."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    mark, table = summarise(rows)
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    for (name, row), color in zip(table.items(), ("#8c8c8c", "#d98c2b", "#2b6cb0", "#2f9e6e"), strict=True):
        steps = [step for step, _ in row["runs"][0]["curve"]]
        losses = list(zip(*([loss for _, loss in run["curve"]] for run in row["runs"]), strict=True))
        axes.plot(steps, [statistics.median(values) for values in losses], color=color, label=name, linewidth=1.6)
        axes.fill_between(
            steps, [min(v) for v in losses], [max(v) for v in losses], color=color, alpha=0.2, linewidth=0
        )
    axes.axhline(mark, color="#444444", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer steps of 4096 tokens", ylabel="validation loss, nats per token")
    axes.set_ylim(mark - 0.5, mark + 2.0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="file for the results, one JSON object a line")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--plot", type=Path, help="draw the results that exist instead of training")
    arguments = parser.parse_args()
    if arguments.plot:
        rows = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
        plot(rows, arguments.plot)
    else:
        rows = race(arguments.device, arguments.workers)
        arguments.results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
