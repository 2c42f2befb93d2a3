"""The reference's log-probabilities on disk: found by content, refused for another model or data, whole after a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from anarcho_train import ReferenceCache, ReferenceCacheError, ReferencedTraining, ReferencedValidation

from .test_train_preference import Buckets, Pairs, make_pairs

HASHES = {"model": "a" * 64, "data": "b" * 64}


def sums(batch) -> np.ndarray:
    """A "model" that can be worked out: what the counted targets add up to."""
    return -(batch.weights * (1 + batch.targets)).sum(axis=1).astype(np.float32)


def filled(directory, **options) -> ReferenceCache:
    cache = ReferenceCache(directory, hashes=HASHES)
    cache.compute([make_pairs(4, seed=s) for s in range(5)], sums, **options)
    return cache


def test_rows_are_found_again_in_any_order_and_with_any_padding(tmp_path):
    filled(tmp_path / "cache")
    cache = ReferenceCache(tmp_path / "cache", hashes=HASHES)
    assert cache.complete
    assert len(cache) == 40
    batch = make_pairs(4, seed=3)
    order = np.random.default_rng(0).permutation(8)
    shuffled = Pairs(*(np.pad(a[order], ((0, 2), (0, 5))) for a in (batch.tokens, batch.targets, batch.weights)))
    values = cache.rows(shuffled)
    assert values.dtype == np.float32
    assert values.tolist() == [*sums(batch)[order].tolist(), 0.0, 0.0]


def test_what_a_row_does_not_depend_on_is_left_out_of_its_key_and_what_it_depends_on_is_not(tmp_path):
    batch = make_pairs(4, seed=1)
    batch.weights[:, -2:] = 0
    keep = batch.weights.any(axis=1)
    batch = Pairs(batch.tokens[keep], batch.targets[keep], batch.weights[keep])
    cache = ReferenceCache(tmp_path, hashes=HASHES)
    cache.compute([batch], sums)
    later = replace(batch, tokens=batch.tokens.copy(), targets=batch.targets.copy())
    later.tokens[:, -1] = later.targets[:, -1] = 0
    assert cache.rows(later).tolist() == sums(batch).tolist()
    earlier = replace(batch, tokens=batch.tokens.copy())
    earlier.tokens[:, 0] += 1
    for changed in (earlier, replace(batch, positions=batch.tokens)):
        with pytest.raises(ReferenceCacheError, match=rf"lacks {len(batch.tokens)} of the {len(batch.tokens)} rows"):
            cache.rows(changed)


@pytest.mark.parametrize("name", ["model", "data"])
def test_values_of_another_model_or_other_data_are_refused_by_name(tmp_path, name):
    filled(tmp_path / "cache")
    with pytest.raises(ReferenceCacheError, match=rf"another {name} \({HASHES[name]}; expected {'c' * 64}\); delete"):
        ReferenceCache(tmp_path / "cache", hashes=HASHES | {name: "c" * 64})
    with pytest.raises(ReferenceCacheError, match="another precision"):
        ReferenceCache(tmp_path / "cache", hashes=HASHES | {"precision": "float32"})


def test_a_computation_that_fails_goes_on_where_it_was_and_a_complete_one_is_not_repeated(tmp_path):
    worked: list[int] = []

    def fail_later(batch):
        if len(worked) == 3:
            raise RuntimeError("out of memory")
        worked.append(1)
        return sums(batch)

    data = [make_pairs(4, seed=s) for s in range(5)]
    with pytest.raises(RuntimeError, match="out of memory"):
        ReferenceCache(tmp_path, hashes=HASHES).compute(data, fail_later)
    cache = ReferenceCache(tmp_path, hashes=HASHES)
    assert not cache.complete
    assert len(cache) == 3 * 8
    again: list[int] = []
    cache.compute(data, lambda batch: again.append(1) or sums(batch))
    assert len(again) == 2
    cache.compute(data, lambda batch: pytest.fail("computed again"))
    assert all(np.array_equal(cache.rows(batch), sums(batch)) for batch in data)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import anarcho_train.reference as reference
from types import SimpleNamespace
kill_at, calls = int(sys.argv[2]), 0
def count(event):
    global calls
    calls += 1
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
def traced(function):
    def call(*args, **kwargs):
        count("before")
        result = function(*args, **kwargs)
        count("after")
        return result
    return call
os.fsync = traced(os.fsync)
Path.replace = traced(Path.replace)
def batches():
    for seed in range(3):
        random = np.random.default_rng(seed)
        tokens = random.integers(50, size=(4, 5)).astype(np.int32)
        yield SimpleNamespace(tokens=tokens, targets=tokens, weights=np.ones((4, 5), np.float32), positions=None, segments=None)
cache = reference.ReferenceCache(Path(sys.argv[1]), hashes={"model": "m"})
cache.compute(batches(), lambda batch: -batch.targets.sum(axis=1).astype(np.float32), save_seconds=0.0)
print(len(cache), calls)
for batch in batches():
    assert (cache.rows(batch) == -batch.targets.sum(axis=1)).all()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills by signal need a POSIX system")
def test_a_kill_at_any_write_leaves_a_cache_that_the_next_attempt_completes(tmp_path):
    def attempt(kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    for kill_at in (
        3,
        5,
        8,
        11,
    ):  # Within the first part, its manifest, the second part, its manifest: each goes on from the one before.
        assert attempt(kill_at).returncode == -signal.SIGKILL
    done = attempt(0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "12"
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    manifest = json.loads((tmp_path / "cache" / "reference.json").read_text())
    assert manifest["complete"]
    assert {part["name"] for part in manifest["parts"]} | {"reference.json"} == names


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "format", "name"])
def test_damage_is_refused_by_the_files_name(tmp_path, damage):
    filled(tmp_path)
    part, manifest = tmp_path / "part-00000.safetensors", tmp_path / "reference.json"
    data, text = part.read_bytes(), manifest.read_text()
    if damage == "flip":
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        part.write_bytes(data[:-9])
    elif damage == "remove":
        part.unlink()
    elif damage == "manifest":
        manifest.write_text(text[:-20])
    elif damage == "format":
        manifest.write_text(text.replace('"format": 1', '"format": 2'))
    else:
        manifest.write_text(text.replace("part-00000", "../part-00000"))
    named = "reference.json" if damage in ("manifest", "format", "name") else "part-00000.safetensors"
    with pytest.raises(ReferenceCacheError, match=rf"{named}.*; delete the folder|{named}.*: delete the folder"):
        ReferenceCache(tmp_path, hashes=HASHES)


@pytest.mark.parametrize("values", [np.array([np.nan] * 8, np.float32), np.zeros(7, np.float32)])
def test_a_reference_that_gives_no_numbers_is_refused_and_nothing_of_it_is_kept(tmp_path, values):
    cache = ReferenceCache(tmp_path, hashes=HASHES)
    with pytest.raises(ReferenceCacheError, match=r"expected 8 finite numbers"):
        cache.compute([make_pairs(4)], lambda batch: values)
    assert len(ReferenceCache(tmp_path, hashes=HASHES)) == 0


def test_batches_carry_the_reference_and_are_otherwise_what_they_were(tmp_path):
    inner = Buckets()
    cache = ReferenceCache(tmp_path, hashes=HASHES)
    cache.compute((inner.sample(i) for i in range(10)), sums)
    training, validation = ReferencedTraining(inner, cache), ReferencedValidation(inner, cache)
    assert (training.state(0, 1), training.position(13)) == ("ready", {"epoch": 1, "cursor": 3})
    assert np.array_equal(training.batch(7, 1).reference, sums(inner.sample(7)))
    assert (validation.num_windows, validation.num_tokens, validation.num_bytes) == (4, 60, 120)
    taken = list(validation.batches(1, max_windows=3))
    assert len(taken) == 3
    assert all(np.array_equal(b.reference, sums(inner.sample(i))) for i, b in enumerate(taken))
    assert all(np.array_equal(b.weights, inner.sample(i).weights) for i, b in enumerate(taken))
