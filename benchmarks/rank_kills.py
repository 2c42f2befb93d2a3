"""Kills processes of a training over several of them, again and again, while torchrun starts all of them anew.

    python benchmarks/rank_kills.py --kills 20

For each strategy, a tiny model is trained over two processes on the CPU: once without a fault, and once while a process drawn by chance
is ended by SIGKILL at a moment drawn by chance: most of them in the training loop, whose steps, evaluations and checkpoints (of `fsdp`
written beside the training) lie close together, the others while processes start, meet and load. At the end, every attempt at a step must
have had that step's samples, no step may be missing, every checkpoint must be sound, and the last one is compared with that of the run
without a fault. One line of JSON for each strategy; the exit status is 1 where something was not as it should be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PROCESSES = 2
STARTING_SHARE = 0.2
"""Of the kills, before the first step of an attempt."""
STARTING_SECONDS, TRAINING_SECONDS = 6.0, 1.0
"""How long after the start of processes, or their first step, a kill comes at the latest."""
PATIENCE = 240.0
"""Seconds in which a new attempt has to come to its first step."""
SETTINGS = {
    "tokenizer.vocab_size": 300,
    "model.num_layers": 1,
    "model.dim": 16,
    "model.num_heads": 2,
    "model.hidden_dim": 32,
    "model.context_length": 32,
    "train.batch_tokens": 384,
    "train.micro_batch": 3,
    "train.eval_every": 20,
    "train.checkpoint_every": 5,
    "train.log_every": 1,
    "train.precision": "float32",
    "train.rank_timeout_seconds": 60,
    "train.save_in_background": "true",
    "optim.warmup_steps": 2,
    "optim.ns_dtype": "float32",
    "sample.max_new_tokens": 1,
    "monitor.tensorboard": "false",
}


def main() -> int:
    """Prints a line for each strategy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="for each strategy")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    options = parser.parse_args()
    sound = True
    with tempfile.TemporaryDirectory(prefix="rank-kills-") as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text(made_up_text())
        for strategy in options.strategies:
            found = compared(Path(folder) / strategy, corpus, strategy, options)
            print(json.dumps(found), flush=True)
            sound &= found["status"] == 0 and found["samples_equal"] and found["damaged_checkpoints"] == 0
    return 0 if sound else 1


def made_up_text() -> str:
    """Forty paragraphs."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=5)) for _ in range(50)]
    return "\n\n".join(" ".join(chance.choices(words, k=100)) for _ in range(40))


def compared(folder: Path, corpus: Path, strategy: str, options: argparse.Namespace) -> dict[str, Any]:
    """A run without a fault and one with kills, side by side."""
    whole = Run(folder / "whole", corpus, strategy, steps=options.steps)
    assert whole.finish() == 0, whole.log()
    killed = Run(folder / "killed", corpus, strategy, steps=options.steps)
    begin, chance = time.monotonic(), random.Random(options.seed)
    kills = [killed.kill(chance) for _ in range(options.kills)]
    status = killed.finish()
    if status:
        print(killed.log(), file=sys.stderr)
    ours, theirs = killed.final(), whole.final()
    return {
        "strategy": strategy,
        "processes": PROCESSES,
        "kills": sum(kill is not None for kill in kills),
        "kills_before_the_first_step": sum(kill == "starting" for kill in kills),
        "status": status,
        "attempts": killed.attempts(),
        "steps": options.steps,
        "steps_done_again": sum(map(len, killed.consumed().values())) - options.steps,
        "samples_equal": killed.consumed_as(whole),
        "damaged_checkpoints": killed.damaged_checkpoints(),
        "final_loss": ours["loss"],
        "final_loss_without_kills": theirs["loss"],
        "weights_bitwise_equal": ours["weights"] == theirs["weights"],
        "optimizer_bitwise_equal": ours["optimizer"] == theirs["optimizer"],
        "seconds": round(time.monotonic() - begin),
    }


class Run:
    """A training under torchrun, in a folder of its own."""

    def __init__(self, folder: Path, corpus: Path, strategy: str, *, steps: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        settings = SETTINGS | {"train.strategy": strategy, "train.steps": steps}
        command = ["pretrain", "--device", "cpu", "--data", str(corpus), "--name", "run"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        starter = ["--standalone", "--nproc-per-node", str(PROCESSES), "--max-restarts", "1000"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *starter, __file__, "worker", *command],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("w"),
        )
        self._attempt = -1

    def kill(self, chance: random.Random) -> str | None:
        """Ends one process of the next attempt; returns in which part of it, or None where the run is at its end."""
        starting = chance.random() < STARTING_SHARE
        rank, delay = chance.randrange(PROCESSES), chance.uniform(0, STARTING_SECONDS if starting else TRAINING_SECONDS)
        self._attempt += 1
        begun = f"{'process' if starting else 'trains'}-{self._attempt}-{{}}"
        until = time.monotonic() + PATIENCE
        while not all((self.folder / begun.format(number)).exists() for number in range(PROCESSES)):
            if self._process.poll() is not None:
                return None
            if time.monotonic() > until:
                raise TimeoutError(f"attempt {self._attempt} has not begun after {PATIENCE:g} seconds:\n{self.log()}")
            time.sleep(0.01)
        process = int((self.folder / f"process-{self._attempt}-{rank}").read_text())
        time.sleep(delay)
        reached = (self.folder / f"trains-{self._attempt}-{rank}").exists()
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            return "training" if reached else "starting"
        return None

    def finish(self) -> int:
        """Waits for the end; torchrun's exit status."""
        return self._process.wait(timeout=900)

    def log(self) -> str:
        """The end of what all processes have written to standard error."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def attempts(self) -> int:
        """How often torchrun has started the processes."""
        return len(list(self.folder.glob("process-*-0")))

    def consumed(self) -> dict[int, list[list[str]]]:
        """Of each step, the rows that its attempts were made of, in the order of the ranks; only of attempts of all ranks."""
        shares: dict[tuple[int, int], list[list[str]]] = {}
        for rank in range(PROCESSES):
            for line in (self.folder / f"rows-{rank}.jsonl").read_text().splitlines():
                with suppress(json.JSONDecodeError):  # A kill has cut it.
                    record = json.loads(line)
                    shares.setdefault((record["attempt"], record["step"]), []).append(record["rows"])
        found: dict[int, list[list[str]]] = {}
        for (_, step), rows in shares.items():
            if len(rows) == PROCESSES:
                found.setdefault(step, []).append([row for share in rows for row in share])
        return found

    def consumed_as(self, whole: Run) -> bool:
        """Whether each attempt at a step had the samples of that run's, and no step was left out."""
        ours, theirs = self.consumed(), whole.consumed()
        return ours.keys() == theirs.keys() and all(
            rows == theirs[step][0] for step, attempts in ours.items() for rows in attempts
        )

    def damaged_checkpoints(self) -> int:
        """Of those that have a checkpoint's name, however long ago they were written."""
        from anarcho_train import CheckpointStore

        checkpoints = self.folder / "runs" / "run" / "checkpoints"
        return sum(not info.valid for info in CheckpointStore(checkpoints).list()) + len(
            list(checkpoints.glob("*.damaged-*"))
        )

    def final(self) -> dict[str, Any]:
        """The last loss, and hashes of what the last checkpoint holds."""
        run = self.folder / "runs" / "run"
        last = max((run / "checkpoints").glob("step-*"))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {
            "loss": [record["loss"] for record in records if record["kind"] == "train"][-1],
            "weights": digest([last / "model.safetensors"]),
            "optimizer": digest(sorted(last.glob("optimizer*.safetensors"))),
        }


def digest(files: list[Path]) -> str:
    """Of the bytes of files one after the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def work(arguments: list[str]) -> None:
    """One of the processes: the command, with notes on what each step is made of."""
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(f"process-{attempt}-{rank}").write_text(str(os.getpid()))
    from anarcho_cli.main import run
    from anarcho_train.steps.torch import TorchStep

    train = TorchStep.train

    def noted(self: TorchStep, micro_batches: Any, *, schedule: Any) -> Any:
        rows = [hashlib.sha256(row.tobytes()).hexdigest()[:8] for batch in micro_batches for row in batch.tokens]
        with Path(f"rows-{rank}.jsonl").open("a") as notes:
            notes.write(json.dumps({"attempt": int(attempt), "step": schedule.number, "rows": rows}) + "\n")
        Path(f"trains-{attempt}-{rank}").touch()
        return train(self, micro_batches, schedule=schedule)

    TorchStep.train = noted  # type: ignore[method-assign]
    sys.argv = ["anarcho", *arguments]
    run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2:])
    else:
        sys.exit(main())
