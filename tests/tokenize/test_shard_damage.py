"""Damaged shards that may be lost: nothing of them counts, every other token keeps its place, and too many are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from anarcho_tokenize import BucketBatches, DataConfig, PackedBatches, SequentialBatches, ShardError, TokenShards

from .test_token_shards import Growing

SUFFIXES = (".bin", ".mask")


def flip(file: Path, at: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def part(folder: Path, *, kind: str = "text", shards: int = 6) -> Path:
    header = {} if kind == "text" else {"kind": kind, "vocab_size": 65_000}
    growing = Growing(folder, **header)
    for number in range(shards):
        growing.append(documents=6, complete=number == shards - 1)
    return folder


def open_tolerant(folder: Path, *, share: float = 0.5, growing: bool = False) -> tuple[TokenShards, list[str]]:
    told: list[str] = []
    shards = TokenShards.open(folder, growing=growing, max_damaged_share=share, on_damage=told.append)
    if not growing:
        shards.verify()
    return shards, told


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
@pytest.mark.parametrize("isolate", [False, True])
def test_tokens_of_a_lost_shard_count_nothing_and_all_others_stay_where_they_are(tmp_path, packing, isolate):
    options = {"length": 8, "packing": packing, "isolate_documents": isolate}
    sound = TokenShards.open(part(tmp_path / "sound"))
    expected = PackedBatches(sound, seed=3, **options).batch(0, 30)
    lost, told = open_tolerant(damaged(tmp_path / "damaged"))
    found = PackedBatches(lost, seed=3, **options).batch(0, 30)
    start, stop = lost.shard_starts[2:4]
    assert len(told) == 1
    assert "shard-00002 is damaged and left out: the sha256 of shard-00002.bin" in told[0]
    assert lost.damaged_tokens == stop - start
    kept = found.weights > 0
    assert kept.sum() < (expected.weights > 0).sum()
    np.testing.assert_array_equal(found.targets[kept], expected.targets[kept])
    everything = SequentialBatches(lost, **options)
    assert everything.num_tokens == lost.num_tokens - (stop - start)
    assert sum(float(batch.weights.sum()) for batch in everything.batches(4)) == everything.num_tokens
    assert everything.num_bytes == pytest.approx(sound.num_bytes * everything.num_tokens / sound.num_tokens, abs=1)


def damaged(folder: Path) -> Path:
    flip(part(folder) / "shard-00002.bin")
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_conversations_and_pairs_of_a_lost_shard_count_nothing(tmp_path, kind, suffix):
    folder = part(tmp_path, kind=kind)
    whole = BucketBatches(TokenShards.open(folder), batch_tokens=32, length=16, seed=0)
    before = [whole.batch(number) for number in range(whole.num_batches)]
    flip(folder / f"shard-00001{suffix}")
    lost, told = open_tolerant(folder)
    batches = BucketBatches(lost, batch_tokens=32, length=16, seed=0)
    after = [batches.batch(number) for number in range(batches.num_batches)]
    assert len(told) == 1
    assert len(after) == len(before), "the order of the samples is as before"
    mask = TokenShards.open(folder).loss_mask
    assert lost.loss_mask(*lost.shard_starts[1:3]).sum() == 0
    assert lost.loss_mask(*lost.shard_starts[3:5]).sum() == mask(*lost.shard_starts[3:5]).sum() > 0
    for old, new in zip(before, after, strict=True):
        kept = new.weights > 0
        np.testing.assert_array_equal(new.targets[kept], old.targets[kept])
    assert 0 < sum(batch.weights.sum() for batch in after) < sum(batch.weights.sum() for batch in before)


def test_a_truncated_shard_can_be_lost_too(tmp_path):
    folder = part(tmp_path)
    file = folder / "shard-00003.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"shard-00003.bin has .* bytes; expected"):
        TokenShards.open(folder)
    shards, told = open_tolerant(folder)
    assert list(shards.damaged) == [3]
    assert len(told) == 1
    assert set(shards.tokens(*shards.shard_starts[3:5]).tolist()) == {shards.eot_id}


def test_too_much_damage_is_refused_with_every_file_by_name(tmp_path):
    folder = part(tmp_path)
    for number in (1, 2, 4):
        flip(folder / f"shard-0000{number}.bin")
    with pytest.raises(
        ShardError, match=r"shard-00001.bin.*shard-00002.bin.*share of 0.3 that data.max_bad_share allows"
    ):
        open_tolerant(folder, share=0.3)


def test_where_documents_start_is_never_done_without(tmp_path):
    folder = part(tmp_path)
    flip(folder / "shard-00001.idx", at=8)
    with pytest.raises(ShardError, match=r"sha256 of shard-00001.idx"):
        open_tolerant(folder)


def test_damage_to_a_part_that_grows_is_found_at_the_first_use(tmp_path):
    growing = Growing(tmp_path)
    for _ in range(4):
        growing.append(documents=6)
    shards, told = open_tolerant(tmp_path, growing=True)
    batches = PackedBatches(shards, length=8, seed=0, shuffle_tokens=16)
    assert batches.state(0, 2) == "ready"
    flip(tmp_path / "shard-00001.bin")
    assert told == []
    start, stop = shards.shard_starts[1:3]
    assert shards.loss_mask(start, stop).sum() == 0
    assert len(told) == 1
    assert shards.loss_mask(0, start).all()


def test_the_policy_is_one_of_two():
    assert DataConfig().damaged_shards == "stop"
    with pytest.raises(ShardError, match=r"data.damaged_shards is 'ignore'; expected one of stop, skip"):
        DataConfig(damaged_shards="ignore")  # type: ignore[arg-type]
