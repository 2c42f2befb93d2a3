"""Stands in for a trainer that reads a stream: a process without torch, for tests that kill it.

    python stream_trainer.py REQUEST.json

reads samples of shards that a `Producer` of its own appends to, in steps. Each step appends a line to `consumed.log`, with the samples'
number and the sha256 of their batch; every few steps it notes how far it is in `position.json`, as a checkpoint does, and goes on from
there when it is started again. `producer.pid` names its producer.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from anarcho_tokenize import DataConfig, PackedBatches, Producer, SourceConfig, StreamedBatches, TokenShards

SAMPLES_A_STEP = 4
STEPS_A_CHECKPOINT = 3


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_bytes())
    directory = Path(request["directory"])
    producer = Producer(_config(request["config"]), request["tokenizer"], directory / "data", notify=_note)
    known = producer.pid
    (directory / "producer.pid").write_text(str(known))
    while not (directory / "data" / "train" / "index.json").exists():
        producer.check()
        time.sleep(0.005)
    shards = TokenShards.open(directory / "data" / "train", growing=True)
    packed = PackedBatches(shards, length=128, seed=7, shuffle_tokens=request["config"]["shuffle_tokens"])
    batches = StreamedBatches(packed, producer)
    position = directory / "position.json"
    sample, logged = json.loads(position.read_bytes()) if position.exists() else (0, 0)
    with (directory / "consumed.log").open("ab") as log:
        log.truncate(logged)
        log.seek(logged)
        while True:
            state = batches.state(sample, SAMPLES_A_STEP)
            if known != producer.pid:
                known = producer.pid
                (directory / "producer.pid").write_text(str(known))
            if state == "waiting":
                time.sleep(0.005)
                continue
            if shards.complete and sample >= (packed.num_samples or 0):
                break  # after one epoch
            batch = batches.batch(sample, SAMPLES_A_STEP)
            digest = hashlib.sha256(batch.tokens.tobytes() + batch.targets.tobytes()).hexdigest()
            log.write(f"{sample} {digest}\n".encode())
            sample += SAMPLES_A_STEP
            if sample // SAMPLES_A_STEP % STEPS_A_CHECKPOINT == 0:
                log.flush()
                staging = position.with_suffix(".partial")
                staging.write_text(json.dumps([sample, log.tell()]))
                os.replace(staging, position)  # noqa: PTH105 - as short as can be
            time.sleep(request["step_seconds"])
    producer.stop()


def _config(values: dict[str, Any]) -> DataConfig:
    sources = tuple(SourceConfig(**source) for source in values.get("sources", ()))
    return DataConfig(**{**values, "sources": sources})


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
