"""How fast text becomes token shards, and in how much memory, beside one process of SentencePiece over the same documents.

    uv run python benchmarks/data_preparation.py books.jsonl.xz --tokenizer runs/x/tokenizer --repeats 3

Each measurement is a process of its own; the kinds alternate, so that a noisy machine disturbs them alike. Memory is the largest sum of the
resident sets of a process and its children, sampled ten times a second (pages that they share count in each). One line of JSON for each
measurement goes to standard output; a table of medians to standard error.

* `sentencepiece`: reads the rows, and calls `SentencePieceProcessor.encode` once for each document;
* `sentencepiece-lines`: the same for each line of a document, which is faster, because its cost grows with length;
* `workers-N`: `prepare_shards` with N processes, from reading to shards on disk (0: in the reading process);
* `workers-N-thrice`: the same over three copies of the source.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from anarcho_tokenize import DataConfig, Tokenizer, prepare_shards, read_documents

SAMPLE_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=psutil.cpu_count(logical=True))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.source, options.tokenizer)))
        return
    kinds = [f"workers-{options.workers}", "workers-0", "sentencepiece-lines", "sentencepiece"]
    results: dict[str, list[dict[str, float]]] = {}
    for repeat in range(options.repeats):
        for kind in [*kinds, *([f"workers-{options.workers}-thrice"] if repeat == 0 else [])]:
            result = run(kind, options)
            results.setdefault(kind, []).append(result)
            print(json.dumps({"kind": kind, **result}), flush=True)
    report(results)


def run(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, str(options.source), "--tokenizer", str(options.tokenizer), "--measure", kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, resident_bytes(watched))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
    return result | {"mb_per_second": result["bytes"] / 1e6 / result["seconds"], "peak_mb": peak / 1e6}


def resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return total


def measure(kind: str, source: Path, tokenizer_path: Path) -> dict[str, float]:
    """Seconds of the work itself, without the start of Python, and the bytes of text."""
    if kind.startswith("sentencepiece"):
        return measure_sentencepiece(source, tokenizer_path, lines=kind.endswith("lines"))
    tokenizer = Tokenizer.load(tokenizer_path)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        text = Path(folder, "text")
        text.mkdir()
        for number in range(3 if kind.endswith("thrice") else 1):
            text.joinpath(f"{number}-{source.name}").symlink_to(source.resolve())
        began = time.perf_counter()
        prepared = prepare_shards(
            DataConfig(source=str(text), num_workers=int(kind.split("-")[1])), tokenizer, Path(folder, "data")
        )
        seconds = time.perf_counter() - began
        shutil.rmtree(Path(folder, "data"))
    return {"seconds": seconds, "bytes": prepared.bytes, "tokens": prepared.tokens}


def measure_sentencepiece(source: Path, tokenizer_path: Path, *, lines: bool) -> dict[str, float]:
    import sentencepiece

    model = Tokenizer.load(tokenizer_path).model_bytes
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    began = time.perf_counter()
    size = tokens = 0
    for document in read_documents(source):
        size += len(document.encode())
        for text in document.split("\n") if lines else [document]:
            tokens += len(processor.encode(text))
    return {"seconds": time.perf_counter() - began, "bytes": size, "tokens": tokens}


def report(results: dict[str, list[dict[str, float]]]) -> None:
    speeds = {kind: statistics.median(result["mb_per_second"] for result in found) for kind, found in results.items()}
    for kind, found in results.items():
        peak = max(result["peak_mb"] for result in found)
        ratios = ", ".join(
            f"{speeds[kind] / speeds[base]:.2f} x {base}" for base in ("sentencepiece", "sentencepiece-lines")
        )
        print(f"{kind:22} {speeds[kind]:7.2f} MB/s  {peak:7.0f} MB peak  {ratios}", file=sys.stderr)


if __name__ == "__main__":
    main()
