"""Log-probabilities of the reference model, computed once before preference tuning and kept on disk.

Notable: no second model is in memory while one is trained. A row is known by its content up to its last counted target, so neither the
order of batches nor their padding matters, and a computation that was killed goes on where it was. Each part is written whole under
its name before the manifest lists it; what is listed is checked by SHA-256. Cached values of another model or other data are refused.

Files: ``reference.json`` with the hashes, the parts and whether all rows are there; ``part-00000.safetensors`` and so on with ``keys``
uint8 (rows, 16) and ``logprobs`` float32 (rows,), in nats.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from anarcho_train.durable import sync
from anarcho_train.interfaces import TrainingBatches, ValidationBatches
from anarcho_train.step import Batch

FORMAT = 1
MANIFEST_FILE = "reference.json"
SAVE_SECONDS = 30.0
"""A computation that is killed loses at most so much work."""

_KEY_BYTES = 16


class ReferenceCacheError(ValueError):
    """Cached log-probabilities that cannot be used; the message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True, kw_only=True)
class ReferencedBatch:
    """A batch with the reference's log-probabilities of its rows."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    positions: np.ndarray | None
    segments: np.ndarray | None
    reference: np.ndarray
    """Sum over each row's counted targets, float32 (rows,), in nats; 0 for a row without any."""


class ReferenceCache:
    """The reference's log-probabilities of the rows of one data set, in ``directory``."""

    def __init__(self, directory: Path, *, hashes: Mapping[str, str]) -> None:
        """Opens what is there, or begins anew where nothing is.

        ``hashes`` say by name what the values follow from, such as the SHA-256 of the model, of the data, and the arithmetic. Raises
        `ReferenceCacheError` naming the first that is another one, or the first file that is damaged.
        """
        self.directory = Path(directory)
        self.hashes = dict(hashes)
        self.complete = False
        """Whether all rows are there."""
        self._parts: list[dict[str, Any]] = []
        self._keys = np.empty(0, dtype=f"S{_KEY_BYTES}")
        self._logprobs = np.empty(0, dtype=np.float32)
        if (self.directory / MANIFEST_FILE).exists():
            self._open()

    def __len__(self) -> int:
        """Rows that are there."""
        return len(self._keys)

    def compute(
        self,
        batches: Iterable[Batch],
        row_logprobs: Callable[[Batch], np.ndarray],
        *,
        save_seconds: float = SAVE_SECONDS,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Computes the rows of ``batches`` that are not there yet, every ``save_seconds`` to disk; nothing where all are there.

        ``row_logprobs`` gives float32 (rows,) for a batch, such as `anarcho_train.steps.torch.TorchStep.answer_logprobs` of the model
        before it is trained. ``progress`` receives the number of rows that are there, whenever they are saved.
        """
        if self.complete:
            return
        keys: list[np.ndarray] = []
        logprobs: list[np.ndarray] = []
        saved_at = time.monotonic()

        def flush() -> None:
            if keys:
                self._save_part(np.concatenate(keys), np.concatenate(logprobs))
                keys.clear()
                logprobs.clear()
                progress(len(self))

        try:
            for batch in batches:
                counted, batch_keys = _counted(batch), _row_keys(batch)
                if self._find(batch_keys)[1].all():
                    continue
                logprobs.append(_checked(row_logprobs(batch), rows=len(counted))[counted])
                keys.append(batch_keys)
                if time.monotonic() - saved_at >= save_seconds:
                    flush()
                    saved_at = time.monotonic()
        finally:
            flush()
        self.complete = True
        self._save_manifest()

    def rows(self, batch: Batch) -> np.ndarray:
        """The values of the rows of a batch, float32 (rows,), 0 for padding; raises `ReferenceCacheError` where one is not there."""
        counted = _counted(batch)
        places, found = self._find(_row_keys(batch))
        if not found.all():
            raise ReferenceCacheError(
                f"{self.directory} lacks {np.count_nonzero(~found)} of the {len(found)} rows of a batch; expected all rows of the data, "
                "so delete the folder to compute them anew"
            )
        values = np.zeros(len(counted), dtype=np.float32)
        values[counted] = self._logprobs[places]
        return values

    def with_reference(self, batch: Batch) -> ReferencedBatch:
        """The batch with its rows' values."""
        return ReferencedBatch(
            tokens=batch.tokens,
            targets=batch.targets,
            weights=batch.weights,
            positions=batch.positions,
            segments=batch.segments,
            reference=self.rows(batch),
        )

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the keys are among the sorted ones, and whether they are."""
        if not len(self._keys):
            return np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=np.bool_)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return places, self._keys[places] == keys

    def _add(self, keys: np.ndarray, logprobs: np.ndarray) -> None:
        self._keys, first = np.unique(np.concatenate([self._keys, keys]), return_index=True)
        self._logprobs = np.concatenate([self._logprobs, logprobs])[first]

    def _save_part(self, keys: np.ndarray, logprobs: np.ndarray) -> None:
        name = f"part-{len(self._parts):05d}.safetensors"
        raw = np.frombuffer(keys.tobytes(), dtype=np.uint8).reshape(-1, _KEY_BYTES)
        data = save({"keys": raw, "logprobs": logprobs.astype(np.float32)})
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / name, data)
        self._parts.append({"name": name, "rows": len(keys), "sha256": hashlib.sha256(data).hexdigest()})
        self._save_manifest()
        self._add(keys, logprobs)

    def _save_manifest(self) -> None:
        manifest = {"format": FORMAT, "hashes": self.hashes, "complete": self.complete, "parts": self._parts}
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / MANIFEST_FILE, (json.dumps(manifest, indent=1) + "\n").encode())

    def _open(self) -> None:
        manifest = _read_manifest(self.directory / MANIFEST_FILE)
        for name in sorted(self.hashes.keys() | manifest["hashes"].keys()):
            found, expected = manifest["hashes"].get(name), self.hashes.get(name)
            if found != expected:
                raise ReferenceCacheError(
                    f"{self.directory} holds log-probabilities of another {name} ({found}; expected {expected}); delete the folder to "
                    "compute them anew"
                )
        for part in manifest["parts"]:
            self._add(*_read_part(self.directory, part))
        self._parts, self.complete = manifest["parts"], manifest["complete"]


@dataclass(frozen=True)
class ReferencedTraining:
    """Training batches with the reference's log-probabilities."""

    batches: TrainingBatches
    cache: ReferenceCache

    def batch(self, first_sample: int, count: int) -> ReferencedBatch:
        """As the inner batches'."""
        return self.cache.with_reference(self.batches.batch(first_sample, count))

    def position(self, sample: int) -> dict[str, int]:
        """As the inner batches'."""
        return self.batches.position(sample)

    def state(self, first_sample: int, count: int) -> Literal["ready", "waiting", "ended"]:
        """As the inner batches'."""
        return self.batches.state(first_sample, count)


class ReferencedValidation:
    """Validation batches with the reference's log-probabilities."""

    def __init__(self, validation: ValidationBatches, cache: ReferenceCache) -> None:
        self._validation, self._cache = validation, cache
        self.num_windows = validation.num_windows
        self.num_tokens = validation.num_tokens
        self.num_bytes = validation.num_bytes

    def batches(self, batch_size: int = 1, *, max_windows: int | None = None) -> Iterator[ReferencedBatch]:
        """As the inner batches."""
        for batch in self._validation.batches(batch_size, max_windows=max_windows):
            yield self._cache.with_reference(batch)


def _counted(batch: Batch) -> np.ndarray:
    """Which rows have a target that counts, bool (rows,)."""
    return (batch.weights != 0).any(axis=1)


def _row_keys(batch: Batch) -> np.ndarray:
    """What a counted row's log-probability follows from, hashed: its content up to the last target that counts."""
    arrays = [batch.tokens, batch.targets, batch.positions, batch.segments]
    whole = [np.asarray(array, dtype="<i4") for array in arrays if array is not None]
    weights = np.asarray(batch.weights, dtype="<f4")
    keys = []
    for row in np.flatnonzero(_counted(batch)).tolist():
        stop = int(np.flatnonzero(weights[row])[-1]) + 1
        content = b"".join(array[row, :stop].tobytes() for array in (*whole, weights))
        keys.append(hashlib.blake2b(content, digest_size=_KEY_BYTES).digest())
    return np.array(keys, dtype=f"S{_KEY_BYTES}")


def _checked(logprobs: np.ndarray, *, rows: int) -> np.ndarray:
    if logprobs.shape != (rows,) or not np.isfinite(logprobs).all():
        raise ReferenceCacheError(
            f"the reference gave log-probabilities of shape {logprobs.shape}, {np.count_nonzero(~np.isfinite(logprobs))} of them not "
            f"finite; expected {rows} finite numbers: use another base model, or train.precision = 'float32'"
        )
    return logprobs.astype(np.float32)


def _read_manifest(file: Path) -> dict[str, Any]:
    advice = "delete the folder to compute the log-probabilities anew"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReferenceCacheError(f"{file} is damaged ({error}); {advice}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ReferenceCacheError(f"{file} is no manifest of format {FORMAT}; {advice}")
    kinds = {"hashes": dict, "parts": list, "complete": bool}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise ReferenceCacheError(
                f"{file} has {manifest.get(name)!r} as '{name}'; expected a {kind.__name__}: {advice}"
            )
    return manifest


def _read_part(directory: Path, part: Any) -> tuple[np.ndarray, np.ndarray]:
    advice = "delete the folder to compute the log-probabilities anew"
    name = part.get("name") if isinstance(part, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise ReferenceCacheError(
            f"{directory / MANIFEST_FILE} lists {part!r}; expected parts by plain names: {advice}"
        )
    try:
        data = (directory / name).read_bytes()
    except FileNotFoundError:
        raise ReferenceCacheError(f"{directory / name} is missing, but {MANIFEST_FILE} lists it; {advice}") from None
    if hashlib.sha256(data).hexdigest() != part.get("sha256"):
        raise ReferenceCacheError(f"{directory / name} has another SHA-256 than {MANIFEST_FILE} says; {advice}")
    try:
        arrays = load(data)
        keys, logprobs = arrays["keys"], arrays["logprobs"]
    except (SafetensorError, KeyError) as error:
        raise ReferenceCacheError(f"{directory / name} is no part of this format ({error}); {advice}") from None
    return np.frombuffer(keys.tobytes(), dtype=f"S{_KEY_BYTES}"), logprobs


def _write(file: Path, data: bytes) -> None:
    """The file is the old or the new one at every instant, also when the power fails."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(file)
    sync(file.parent)
