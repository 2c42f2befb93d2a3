"""How many clients `anarcho serve` bears: many streaming at once for a minute, against one after the other on the same server.

    uv run python benchmarks/serving.py runs/x --clients 64 --seconds 60 --slots 64 --context 512

The server is a process of its own, and the clients share another, so both take from the same cores. One client alone comes before and
after the many, so that a machine that becomes slower disturbs both alike. A client asks again as soon as it has its answer, each time with
another prompt. Tokens are counted as the server reports them; of answers that the end of the time cuts short, each event counts as one.
Time to the first token runs from the moment at which the request is sent, and includes connecting and waiting for a slot. Tokens per second
of the server's processor time are there because other programs on the machine disturb them less.

One JSON object goes to standard output, a Markdown table to standard error. The exit status is 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TEXT = "the sea was calm and an old ship sailed with all hands toward a distant harbour where no one waited for it"
WORDS = TEXT.split()


@dataclass
class Phase:
    """What the clients of a stretch of time saw."""

    clients: int
    seconds: float = 0.0
    server_cpu_seconds: float = 0.0
    tokens: int = 0
    answers: int = 0
    first_token_seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """The figures of a row."""
        waits = sorted(self.first_token_seconds) or [0.0]
        places = {
            f"first_token_p{p}_seconds": round(waits[min(len(waits) - 1, len(waits) * p // 100)], 3)
            for p in (50, 90, 99)
        }
        rate = round(self.tokens / self.seconds, 1)
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "answers": self.answers,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "tokens_per_cpu_second": round(self.tokens / max(self.server_cpu_seconds, 1e-9), 1),
            **places,
            "errors": len(self.errors),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a run, a checkpoint or a model directory")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long the many clients ask; one alone asks half as long"
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    print(json.dumps(result))
    print(table(result), file=sys.stderr)
    sys.exit(1 if any(row["errors"] for row in result["phases"]) else 0)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start a server, ask it, end it."""
    command = [sys.executable, "-m", "anarcho_cli", "serve", str(options.model), "--port", "0", "--device", "cpu"]
    command += [
        "--slots",
        str(options.slots),
        "--context",
        str(options.context),
        "--connections",
        str(options.clients + 8),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"http://[\d.]+:(\d+)", line)))
        await ask(port, "the", options, Phase(1))  # warms up
        phases = []
        for clients, share in ((1, 0.25), (options.clients, 1.0), (1, 0.25)):
            before = cpu_seconds(process.pid)
            phases.append(await run(port, clients, options.seconds * share, options))
            phases[-1].server_cpu_seconds = cpu_seconds(process.pid) - before
            print(json.dumps(phases[-1].report()), phases[-1].errors[:3], file=sys.stderr)
    finally:
        process.terminate()
        process.wait(timeout=30)
    alone = [phase.tokens / phase.seconds for phase in phases if phase.clients == 1]
    alone_cpu = [phase.tokens / phase.server_cpu_seconds for phase in phases if phase.clients == 1]
    many = next(phase for phase in phases if phase.clients == options.clients)
    return {
        "model": str(options.model),
        "parameters": parameters(options.model),
        "threads": options.threads,
        "slots": options.slots,
        "context": options.context,
        "max_tokens": options.max_tokens,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "phases": [phase.report() for phase in phases],
        "times_one_at_a_time": round(many.tokens / many.seconds / statistics.mean(alone), 2),
        "times_one_at_a_time_by_cpu_seconds": round(
            many.tokens / many.server_cpu_seconds / statistics.mean(alone_cpu), 2
        ),
    }


def cpu_seconds(process: int) -> float:
    """Processor time that the process has used so far, by all of its threads."""
    times = psutil.Process(process).cpu_times()
    return times.user + times.system


def parameters(model: Path) -> int | None:
    """Parameters of the model, where the directory itself holds it."""
    from anarcho_model.directory import load_config

    return load_config(model).num_parameters if (model / "config.json").is_file() else None


async def run(port: int, clients: int, seconds: float, options: argparse.Namespace) -> Phase:
    """So many clients, each asking again and again until the time is over."""
    phase, start = Phase(clients), time.monotonic()

    async def client(number: int) -> None:
        for turn in range(10**9):
            words = [
                WORDS[(number * 7 + turn * 5 + i * (1 + number % 5)) % len(WORDS)] for i in range(options.prompt_words)
            ]
            try:
                await ask(port, f"{number} {turn} " + " ".join(words), options, phase)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                phase.errors.append(f"{type(error).__name__}: {error}")

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.sleep(seconds)
    phase.seconds = time.monotonic() - start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return phase


async def ask(port: int, prompt: str, options: argparse.Namespace, phase: Phase) -> None:
    """One streamed completion; ValueError for anything but a whole one."""
    asked = {
        "prompt": prompt,
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(asked).encode()
    start, events, usage = time.monotonic(), 0, None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError(f"{status!r} {await reader.read(1000)!r}")
        async for line in reader:
            if line == b"data: [DONE]\n":
                break
            if not line.startswith(b"data: "):
                continue
            if b'"usage"' in line:
                usage = json.loads(line[6:])["usage"]
            elif b'"error"' in line:
                raise ValueError(line.decode())
            else:
                events += 1
                if events == 1:
                    phase.first_token_seconds.append(time.monotonic() - start)
        if usage is None:
            raise ValueError("the stream ended too early")
        phase.answers += 1
    finally:
        phase.tokens += events if usage is None else usage["completion_tokens"]
        writer.close()


def table(result: dict[str, Any]) -> str:
    """The phases as a Markdown table."""
    names = [
        "clients",
        "tokens_per_second",
        "tokens_per_cpu_second",
        "answers",
        *(f"first_token_p{p}_seconds" for p in (50, 90, 99)),
        "errors",
    ]
    head = [
        "clients",
        "tokens/s",
        "tokens per CPU second",
        "answers",
        *(f"first token, p{p} (s)" for p in (50, 90, 99)),
        "errors",
    ]
    rows = [[str(phase[name]) for name in names] for phase in result["phases"]]
    lines = [" | ".join(cells) for cells in (head, ["---:"] * len(head), *rows)]
    ratio, by_cpu = result["times_one_at_a_time"], result["times_one_at_a_time_by_cpu_seconds"]
    sentence = f"Many clients against one at a time: {ratio} x, by the server's CPU time {by_cpu} x."
    return "\n".join([*(f"| {line} |" for line in lines), "", sentence])


if __name__ == "__main__":
    main()
