"""The way of text into a training step: preparing token shards, and reading batches from them that are packed to the run's length.

Notable: both are done as a run does them, with its tokenizer's size, its worker processes and its packing, on a part of its text that takes
seconds. Shards that have just been written are read from memory; a disk that a long run reads from anew is not measured.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from anarcho_tokenize import PreparationReport

from anarcho_cli.benching.cases import Case
from anarcho_cli.benching.timing import seconds
from anarcho_cli.benching.tokenizing import LEARN_BYTES, beginning
from anarcho_cli.config import RunConfig

if TYPE_CHECKING:
    from anarcho_cli.data import RunData

PREPARED_TOKENS = 4_000_000
"""How much is prepared at most, about; the embedded corpus is less."""
READ_STEPS = 20
"""How many steps' batches are read."""


def measure_data(case: Case) -> dict[str, Any]:
    """Rates of preparing a case's text and of reading a step's batches from it."""
    from anarcho_cli.data import open_part, open_run_data

    with tempfile.TemporaryDirectory(prefix="anarcho-bench-") as folder:
        config = sample_config(case.config)
        tokenizer, directory = Path(folder, "tokenizer"), Path(folder, "data")
        learn_tokenizer(config, tokenizer)
        report, preparing = _timed_preparation(config, tokenizer, directory)
        part = open_part(config, directory / "train")
        with open_run_data(config, tokenizer, directory, prepares=False) as data:
            assert data.samples_per_epoch is not None, "prepared data can be counted"
            samples = data.samples_per_step or config.batch_sequences
            tokens, reading = _read_steps(data, samples)
            epochs = samples / data.samples_per_epoch / reading
        return {
            "source": config.data.name,
            "preparing": {
                "documents_per_second": report.documents / preparing,
                "bytes_per_second": report.bytes / preparing,
                "tokens_per_second": report.tokens / preparing,
                "seconds": preparing,
            },
            "reading": {
                "documents_per_second": part.num_documents * epochs,
                "bytes_per_second": part.num_bytes * epochs,
                "tokens_per_second": tokens / reading,
            },
            "packing": config.data.packing,
            "read_seconds": reading,
        }


def sample_config(config: RunConfig) -> RunConfig:
    """The configuration with a part of its text, prepared before it is read. Raises ValueError where that holds tokens already."""
    require_texts(config)
    wanted = min(config.data.max_tokens or PREPARED_TOKENS, PREPARED_TOKENS)
    data = dataclasses.replace(config.data, max_tokens=wanted, streaming=False, disk_budget=None)
    return dataclasses.replace(config, data=data)


def require_texts(config: RunConfig) -> None:
    """Raises ValueError where the source is not there, or holds tokens rather than texts."""
    from anarcho_tokenize import check_source, is_prepared

    check_source(config.data)
    if not config.data.sources and is_prepared(config.data.source):
        raise ValueError(
            f"data.source is '{config.data.source}', which is prepared already; expected texts, which `anarcho bench` prepares itself"
        )


def learn_tokenizer(config: RunConfig, directory: Path) -> None:
    """A tokenizer of the configured size, learned from the beginning of the text; where a model is tuned, of the embedded corpus.

    A tuned model brings its tokenizer, and rows of conversations are few.
    """
    from anarcho_tokenize import embedded_documents, read_texts, train_tokenizer

    texts = read_texts(config.data) if config.data.kind == "text" else embedded_documents()
    train_tokenizer(beginning(texts, LEARN_BYTES), config=config.tokenizer).save(directory)


def prepare_sample(config: RunConfig, tokenizer: Path, directory: Path) -> PreparationReport:
    """Shards of `sample_config`'s text."""
    from anarcho_tokenize import load_tokenizer, prepare_shards

    return prepare_shards(config.data, load_tokenizer(tokenizer), directory)


def _timed_preparation(config: RunConfig, tokenizer: Path, directory: Path) -> tuple[PreparationReport, float]:
    start = time.perf_counter()
    report = prepare_sample(config, tokenizer, directory)
    return report, time.perf_counter() - start


def _read_steps(data: RunData, samples: int) -> tuple[int, float]:
    """Tokens of a step's batches, padding included as a training step counts them, and the median seconds of reading them."""
    sizes: list[int] = []

    def read(first: int) -> None:
        if data.samples_per_step is None:
            sizes.append(data.train.batch(first, samples).tokens.size)
        else:  # A sample is a batch of its own shape.
            sizes.append(sum(data.train.batch(first + n, 1).tokens.size for n in range(samples)))

    read(0)  # What is prepared once is no part of the speed.
    times = [seconds(lambda first=number * samples: read(first)) for number in range(1, READ_STEPS + 1)]
    return round(median(sizes)), median(times)
