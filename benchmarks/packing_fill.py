"""How full best-fit packing makes its rows, on any data set, at several lengths.

    uv run python benchmarks/packing_fill.py --tokenizer runs/x/tokenizer books.jsonl.xz chat:gsm8k.jsonl.gz

A source is a file of texts, or of conversations behind `chat:`. Each is prepared into token shards and packed. The bound is the number of
rows that the tokens would fill to the last slot; no packing has fewer. Fails where a token is lost.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from anarcho_tokenize import DataConfig, PackedBatches, Tokenizer, TokenShards, prepare_shards

LENGTHS = (512, 2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.tokenizer)
    print(f"{'source':36}{'length':>8}{'rows':>8}{'bound':>8}{'fill':>9}")
    for source in options.sources:
        kind, _, path = source.rpartition(":")
        with tempfile.TemporaryDirectory() as folder:
            config = DataConfig(source=path, kind="chat" if kind == "chat" else "text", validation_fraction=0)
            prepare_shards(config, tokenizer, folder)
            shards = TokenShards.open(Path(folder, "train"))
            for length in LENGTHS:
                show(Path(path).name, shards, length)


def show(name: str, shards: TokenShards, length: int) -> None:
    batches = PackedBatches(shards, length=length, seed=0, packing="best-fit", isolate_documents=True)
    rows = batches.num_samples
    assert rows is not None
    # The first token of a conversation is an input only; of a text, the end-of-text before it is.
    targets = shards.num_tokens - (shards.num_documents if shards.kind == "chat" else 0)
    packed = round(batches.fill * rows * length)
    assert packed == targets, f"{targets - packed} of {targets} tokens are lost"
    print(f"{name:36}{length:8}{rows:8}{-(-targets // length):8}{batches.fill:9.2%}")


if __name__ == "__main__":
    main()
