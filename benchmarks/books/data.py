"""Token ids of a text for training and one for validation, in files that travel to the machine that trains.

Notable:

* documents stand one after another, each with an end-of-text after it; before the first token stands an end-of-text that is not stored,
  so every stored token is a target exactly once;
* bits per byte = loss per target * targets / bytes / ln 2, with the bytes of the texts in UTF-8: the ends of texts are targets that cost
  bits and bring no byte;
* compressed, a part lies in blocks that are read on all cores at once.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from anarcho_train.micro_batch import Rows

META_FILE = "meta.json"
PARTS = ("train", "validation")
BLOCK_BYTES = 4 * 2**20
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]
"""For numbers of two bytes: a tenth smaller than with the defaults, which are for text."""


class TokenText:
    """The tokens of one part, ``stream`` with the end-of-text before the first of them, and the bytes that they stand for."""

    def __init__(self, stream: np.ndarray, *, num_bytes: int) -> None:
        self._stream = stream
        self.num_tokens = len(stream) - 1
        self.num_bytes = num_bytes

    def rows(self, numbers: np.ndarray, *, length: int) -> Rows:
        """The windows with these numbers; window k is of the targets [k * length, (k + 1) * length), beyond the end of weight 0."""
        targets = numbers[:, None] * length + np.arange(length)
        weights = (targets < self.num_tokens) & (numbers[:, None] >= 0)
        targets = np.where(weights, targets, 0)
        return Rows(
            tokens=self._stream[targets].astype(np.int32),
            targets=self._stream[targets + 1].astype(np.int32),
            weights=weights.astype(np.float32),
        )

    def batches(self, rows: int, *, length: int, max_windows: int | None = None) -> Iterator[Rows]:
        """All windows in order in batches of one shape, or at most so many spread evenly; -1 is a row of padding."""
        total = math.ceil(self.num_tokens / length)
        taken = total if max_windows is None else min(max_windows, total)
        chosen = np.full(math.ceil(taken / rows) * rows, -1)
        chosen[:taken] = np.arange(taken) * total // taken
        for numbers in chosen.reshape(-1, rows):
            yield self.rows(numbers, length=length)

    def bits_per_byte(self, loss: float) -> float:
        """From a mean loss in nats per target; of a sample of the windows it takes bytes to be spread as tokens are."""
        return loss * self.num_tokens / self.num_bytes / math.log(2)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What `prepare` has written."""

    train: TokenText
    validation: TokenText
    vocab_size: int


def prepare(train: Path, validation: Path, *, tokenizer: Path, folder: Path, compress: bool) -> dict[str, Any]:
    """Encodes two sources and writes ``train.npy``, ``validation.npy`` (or ``.npy.xz``) and the meta file; returns the latter."""
    from anarcho_tokenize import Tokenizer, read_documents

    encoder = Tokenizer.load(tokenizer)
    if encoder.vocab_size > 2**16:
        raise ValueError(f"{tokenizer} has {encoder.vocab_size} tokens; expected at most 65536, which two bytes hold")
    meta: dict[str, Any] = {
        "vocab_size": encoder.vocab_size,
        "eot_id": encoder.eot_id,
        "tokenizer_sha256": encoder.sha256,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for part, source in zip(PARTS, (train, validation), strict=True):
        num_bytes, pieces = 0, []
        for text in read_documents(source):
            num_bytes += len(text.encode())
            pieces += [encoder.encode_array(text).astype("<u2"), np.array([encoder.eot_id], dtype="<u2")]
        ids = np.concatenate(pieces)
        meta[part] = {"tokens": len(ids), "bytes": num_bytes} | _write(ids, folder / f"{part}.npy", compress=compress)
    (folder / META_FILE).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def load(folder: Path) -> Corpus:
    """Reads what `prepare` has written; raises FileNotFoundError or ValueError that names the file."""
    file = folder / META_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; expected a folder that `prepare` has written")
    meta = json.loads(file.read_text(encoding="utf-8"))
    parts = {}
    for part in PARTS:
        ids = _read(folder / f"{part}.npy", meta[part])
        if len(ids) != meta[part]["tokens"]:
            raise ValueError(
                f"{folder} holds {len(ids)} tokens of {part}; expected {meta[part]['tokens']}: prepare it again"
            )
        stream = np.concatenate([np.array([meta["eot_id"]], dtype=ids.dtype), ids])
        parts[part] = TokenText(stream, num_bytes=meta[part]["bytes"])
    return Corpus(**parts, vocab_size=meta["vocab_size"])


def _write(ids: np.ndarray, file: Path, *, compress: bool) -> dict[str, Any]:
    if not compress:
        np.save(file, ids)
        return {}
    data = ids.tobytes()
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    with ThreadPoolExecutor() as pool:
        packed = list(pool.map(lambda block: lzma.compress(block, filters=FILTERS), blocks))
    file.with_suffix(".npy.xz").write_bytes(b"".join(packed))
    return {"blocks": [len(block) for block in packed]}


def _read(file: Path, meta: dict[str, Any]) -> np.ndarray:
    if "blocks" not in meta:
        return np.load(file)
    packed = file.with_suffix(".npy.xz").read_bytes()
    bounds = pairwise(accumulate(meta["blocks"], initial=0))
    with ThreadPoolExecutor() as pool:
        blocks = pool.map(lzma.decompress, [packed[start:stop] for start, stop in bounds])
        return np.frombuffer(b"".join(blocks), dtype="<u2")
