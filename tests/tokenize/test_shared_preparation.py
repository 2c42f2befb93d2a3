"""Shared preparation: ranks, however many, in whatever order and however often killed, come to the very files of one process."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from anarcho_tokenize import (
    DataConfig,
    PackedBatches,
    PreparationReport,
    ShardError,
    SourceConfig,
    SourceError,
    Tokenizer,
    TokenShards,
    blocks,
    forecast,
    merge_shares,
    merging,
    prepare_shards,
    prepare_share,
    production,
    share_statuses,
    shares,
)
from anarcho_tokenize.blocks import BlockReaders, ListedFile, divide
from anarcho_tokenize.chunks import is_validation
from anarcho_tokenize.files import FileReader, local_files
from anarcho_tokenize.reading import Reading
from anarcho_tokenize.rows import digest_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

WORDS = "whale ship sea captain harpoon mast sail wave island boat Queequeg Ahab white ocean storm".split()  # noqa: SIM905
OPTIONS = {"shard_tokens": 300, "validation_fraction": 0.2, "num_workers": 0}


class Interrupted(BaseException):
    """Stands for whatever ends an attempt."""


def sentences(count: int, *, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [f"{number}: {' '.join(chance.choices(WORDS, k=chance.randrange(3, 30)))}." for number in range(count)]


def lines(texts: list[str], **columns: Any) -> bytes:
    """JSON lines, among them blank and broken ones, one that is too large, and one that is no UTF-8."""
    found: list[bytes] = []
    for number, text in enumerate(texts):
        found.append(json.dumps({"text": text, **columns}).encode())
        found += [b""] * (number % 7 == 3)
        found += [b"{broken"] * (number % 23 == 5)
        found += [b'{"text": "' + b"x" * 900 + b'"}\r'] * (number % 31 == 6)
        found += [b"\xff\xfe"] * (number == 20)
    return b"\n".join(found)


def many_forms(folder: Path) -> DataConfig:
    """Files that are divided and files that are not, some of them damaged in their middle."""
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(sentences(60)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(sentences(90, seed=1))))
    (folder / "c.txt").write_text("\n".join(sentences(20, seed=2)))
    (folder / "d.jsonl.xz").write_bytes(lzma.compress(lines(sentences(90, seed=3)))[:-200])
    for number, name in enumerate(("e.parquet", "f.parquet")):
        table = pa.table({"text": sentences(100, seed=4 + number)})
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        parquet.write_table(table, folder / name, row_group_size=13, **options)
    data = bytearray((folder / "f.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "f.parquet").write_bytes(data)
    (folder / "g.parquet").write_bytes(b"PAR1 and no more")
    (folder / "h.jsonl").write_bytes(b"")
    (folder / "i.jsonl").write_bytes(b"\n" * 900)
    (folder / "j.jsonl.bz2").write_bytes(bz2.compress(lines(sentences(60, seed=6))))
    return DataConfig(source=str(folder), max_bad_share=1, max_document_bytes=800, **OPTIONS)


def repeated_rows(folder: Path) -> DataConfig:
    texts, chance = sentences(80), random.Random(0)
    (folder / "a.jsonl").write_bytes(lines([chance.choice(texts) for _ in range(200)]))
    return DataConfig(source=str(folder), deduplicate=True, max_bad_share=1, **OPTIONS)


def mixture(folder: Path, *, end: Any = "repeat") -> DataConfig:
    (folder / "a.jsonl").write_bytes(lines(sentences(150), score=1))
    (folder / "b.jsonl").write_bytes(lines([*sentences(30, seed=1), *sentences(9)], score=2))
    sources = (
        SourceConfig(source=str(folder / "a.jsonl"), weight=2, min_chars=30),
        SourceConfig(source=str(folder / "b.jsonl"), min_score=2),
    )
    return DataConfig(sources=sources, mixture_end=end, deduplicate=True, max_bad_share=1, **OPTIONS)


def first_of_mixture(folder: Path) -> DataConfig:
    return mixture(folder, end="first")


def conversations(folder: Path) -> DataConfig:
    rows = [[{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text}] for text in sentences(60)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return DataConfig(source=str(folder), kind="chat", **OPTIONS)


def preferences(folder: Path) -> DataConfig:
    rows = [{"prompt": "Say", "chosen": text, "rejected": text[::-1]} for text in sentences(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source=str(folder), kind="preference", **OPTIONS)


def limited(folder: Path) -> DataConfig:
    config = many_forms(folder)
    return DataConfig(source=config.source, max_bad_share=1, max_tokens=9000, validation_tokens=400, **OPTIONS)


FORMS = (many_forms, repeated_rows, mixture, first_of_mixture, conversations, preferences, limited)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and segments; a kill loses nothing that was written, flushed or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 1200)
    monkeypatch.setattr(shares, "_SEGMENT_TOKENS", 500)
    monkeypatch.setattr(shares, "CHUNK_ROWS", 6)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def files_of(directory: Path) -> dict[str, bytes]:
    """All that a preparation has made but its seconds, and the set of seen rows, which differs in what was read ahead."""
    found = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    state = json.loads(found["production.json"])
    found["production.json"] = json.dumps({**state, "seconds": 0}).encode()
    return {name: data for name, data in found.items() if not name.startswith(("seen.sqlite", ".lock"))}


def by_one(config: DataConfig, tokenizer: Tokenizer, directory: Path) -> dict[str, bytes]:
    prepare_shards(config, tokenizer, directory)
    return files_of(directory)


def by_ranks(config: DataConfig, tokenizer: Tokenizer, directory: Path, *, world: int) -> dict[str, bytes]:
    for rank in reversed(range(world)):
        prepare_share(config, tokenizer, directory, rank=rank, world=world)
    merge_shares(directory)
    return files_of(directory)


def interrupting(chance: random.Random, *, most: int) -> Callable[[PreparationReport], None]:
    left = iter(range(chance.randrange(most)))

    def on_progress(_: PreparationReport) -> None:
        if next(left, None) is None:
            raise Interrupted

    return on_progress


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_any_ranks_in_any_order_through_interruptions_make_the_files_of_one_process(
    form: Callable[[Path], DataConfig], source: Path, english: Tokenizer, tmp_path: Path
) -> None:
    config, chance, interruptions = form(source), random.Random(form.__name__), 0
    expected = by_one(config, english, tmp_path / "one")
    for world in range(1, 6) if form is many_forms else (2 + len(form.__name__) % 4,):
        directory = tmp_path / f"of {world}"
        attempts = list(range(world))
        while attempts:
            rank = chance.choice(attempts)
            try:
                prepare_share(
                    config, english, directory, rank=rank, world=world, on_progress=interrupting(chance, most=9)
                )
                attempts.remove(rank)
            except Interrupted:
                interruptions += 1
        assert {status.is_done for status in share_statuses(directory)} == {True}
        with pytest.raises(Interrupted):
            merge_shares(directory, on_progress=interrupting(chance, most=2))
        merge_shares(directory)
        assert files_of(directory) == expected, world
    assert interruptions > 0


def test_what_ranks_did_is_not_done_again_and_the_source_is_not_needed(
    source: Path, english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixture(source)
    expected = by_one(config, english, tmp_path / "one")
    for rank in range(3):
        prepare_share(config, english, tmp_path / "data", rank=rank, world=3)
    for file in source.iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_array", None)
        merge_shares(tmp_path / "data")
    assert files_of(tmp_path / "data") == expected


def test_each_row_is_read_by_one_rank_and_work_is_shared_evenly(
    source: Path, english: Tokenizer, tmp_path: Path
) -> None:
    (source / "a.jsonl").write_bytes(b"\n".join(json.dumps({"text": text}).encode() for text in sentences(500)))
    (source / "b.jsonl.gz").write_bytes(gzip.compress((source / "a.jsonl").read_bytes()))
    config = DataConfig(source=str(source), **OPTIONS)
    rows = [prepare_share(config, english, tmp_path / "data", rank=rank, world=4).rows for rank in range(4)]
    assert sum(rows) == 1000
    assert max(rows) < 1.35 * 1000 / 4


def test_ranks_stop_where_there_is_enough_and_wrong_guesses_cost_only_time(
    source: Path, english: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "a.jsonl").write_bytes(b"\n".join(json.dumps({"text": text}).encode() for text in sentences(600)))
    config = DataConfig(source=str(source), max_tokens=4000, deduplicate=True, **OPTIONS)
    expected = by_one(config, english, tmp_path / "one")
    rows = json.loads((tmp_path / "one" / "production.json").read_bytes())["counts"]["rows"]
    read = [prepare_share(config, english, tmp_path / "near", rank=rank, world=3).rows for rank in range(3)]
    assert rows < sum(read) < 1.5 * rows < 600
    for margin, name in ((0.4, "low"), (2.0, "high")):
        monkeypatch.setattr(forecast, "_MARGIN", margin)
        assert by_ranks(config, english, tmp_path / name, world=3) == expected, name


def test_few_texts_without_a_validation_part_are_cut_as_by_one_process(
    source: Path, english: Tokenizer, tmp_path: Path
) -> None:
    texts = [text for text in sentences(40) if not is_validation(digest_of(text), fraction=0.2)][:9]
    (source / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(source=str(source), **OPTIONS)
    expected = by_one(config, english, tmp_path / "one")
    assert by_ranks(config, english, tmp_path / "data", world=2) == expected


def test_training_reads_the_merged_data(source: Path, english: Tokenizer, tmp_path: Path) -> None:
    config = mixture(source)
    prepare_shards(config, english, tmp_path / "one")
    by_ranks(config, english, tmp_path / "data", world=2)
    one, merged = (TokenShards.open(tmp_path / name / "train") for name in ("one", "data"))
    merged.verify()
    assert merged.fingerprint == one.fingerprint
    batches = [PackedBatches(part, length=32, seed=3).batch(first_sample=5, count=20) for part in (one, merged)]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_of_json_lines_tile_them(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the lines are and wherever the blocks end, rows come once, in order, from the bytes where they are."""
    pieces = st.sampled_from([b'{"text": "a"}', b'{"text": "bcdefghijklmnop"}', b"", b" ", b"{", b"\r", b"x" * 40])
    content = b"\n".join(data.draw(st.lists(pieces, max_size=12)))
    step, compressed = data.draw(st.integers(1, 30)), data.draw(st.booleans())
    file = tmp_path_factory.mktemp("lines") / ("a.jsonl.gz" if compressed else "a.jsonl")
    file.write_bytes(gzip.compress(content) if compressed else content)
    [given_file] = local_files(file)
    reading = Reading(document_separator=None, max_document_bytes=30, text_columns=("text",), other_columns=())
    expected = [(row.value, row.number, row.end) for row in FileReader(given_file, reading)]
    found, before, readers = [], 0, BlockReaders()
    for start in range(0, len(content) + 1, step):
        block = blocks.Block(0, 0, start, start + step, step, is_stretch=True, rank=0)
        reader = readers.open(given_file, reading, block)
        found += [(row.value, before + row.number, row.end) for row in reader]
        before += reader.num_lines
    readers.close()
    assert found == expected


@given(
    sizes=st.lists(st.tuples(st.sampled_from([".jsonl", ".parquet", ".txt"]), st.integers(0, 10**6)), max_size=20),
    world=st.integers(1, 9),
)
def test_blocks_cover_every_file_and_ranks_have_like_shares(sizes: list[tuple[Any, int]], world: int) -> None:
    files = [ListedFile(str(number), form, "", size, is_remote=False) for number, (form, size) in enumerate(sizes)]
    [found] = divide([files], world=world)
    for number, file in enumerate(files):
        own = [block for block in found if block.file == number]
        assert sum(block.size or 0 for block in own) == file.size
        assert [block.start for block in own[1:]] == [block.stop for block in own[:-1]]
    loads = [sum(block.size or 0 for block in found if block.rank == rank) for rank in range(world)]
    assert max(loads) - min(loads) <= max((block.size or 0 for block in found), default=0) + len(found)


KILLED_AT_STEPS = """
import os, pathlib, shutil, signal, sys, json
from anarcho_tokenize import DataConfig, Tokenizer, blocks, merge_shares, prepare_share, prepare_shards, shares

tokenizer, work = Tokenizer.load(sys.argv[1]), pathlib.Path(sys.argv[2])
config = DataConfig(source=sys.argv[3], max_bad_share=0.5, validation_fraction=0.3, shard_tokens=80, num_workers=0)
target = work / "data"
os.fsync = lambda descriptor: None  # a kill loses nothing that was written
blocks.SMALLEST_BLOCK, shares._SEGMENT_TOKENS, shares.CHUNK_ROWS = 150, 30, 2


def die_at(step):
    count = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("replace", "rename", "unlink", "open", "mkdir"):
        setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
    shutil.rmtree = counted(shutil.rmtree)


def attempt(step):
    child = os.fork()
    if child == 0:
        die_at(step)
        if not (target / "production.json").exists():
            for rank in (1, 0):
                prepare_share(config, tokenizer, target, rank=rank, world=2)
        merge_shares(target)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def files(directory):
    found = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    found["production.json"] = {**json.loads(found["production.json"]), "seconds": 0}
    return {name: data for name, data in found.items() if name != ".lock"}


prepare_shards(config, tokenizer, work / "one")
expected = files(work / "one")
kills = 0
for step in range(1, 10**6, 9):
    status = attempt(step)
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    kills += 1
    assert attempt(step // 2 + 1) in (0, signal.SIGKILL)
    assert attempt(10**9) == 0
    assert files(target) == expected, step
    shutil.rmtree(target)
print(kills)
"""


def test_killed_at_steps_all_along_ranks_and_merge_go_on_to_the_same_files(english: Tokenizer, tmp_path: Path) -> None:
    english.save(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_bytes(
        b"{broken\n" + b"\n".join(json.dumps({"text": text}).encode() for text in sentences(6))
    )
    (tmp_path / "work").mkdir()
    options = [str(tmp_path / "tokenizer"), str(tmp_path / "work"), str(tmp_path / "a.jsonl")]
    run = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEPS, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(run.stdout) > 8


def test_ranks_that_start_at_once_agree(source: Path, english: Tokenizer, tmp_path: Path) -> None:
    config = mixture(source)
    expected = by_one(config, english, tmp_path / "one")
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda rank: prepare_share(config, english, tmp_path / "data", rank=rank, world=5), range(5)))
    merge_shares(tmp_path / "data")
    assert files_of(tmp_path / "data") == expected


def changed(config: DataConfig, **options: Any) -> DataConfig:
    return DataConfig(**({key: getattr(config, key) for key in DataConfig.__dataclass_fields__} | options))


@pytest.fixture
def begun(source: Path, english: Tokenizer, tmp_path: Path) -> tuple[DataConfig, Path]:
    """Ranks 0 and 3 of 5 are done."""
    config = repeated_rows(source)
    for rank in (0, 3):
        prepare_share(config, english, tmp_path / "data", rank=rank, world=5)
    return config, tmp_path / "data"


def test_ranks_of_another_configuration_world_tokenizer_or_source_are_refused(
    begun: tuple[DataConfig, Path], english: Tokenizer, mixed: Tokenizer
) -> None:
    config, directory = begun
    for other, tokenizer, world, message in (
        (config, english, 4, "was begun by 5 ranks, but this one is of 4"),
        (changed(config, validation_fraction=0.1), english, 5, "begun with other values of validation_fraction"),
        (config, mixed, 5, "begun with other values of tokenizer_sha256"),
        (config, english, 3, "The rank is 4 of 3; expected a number from 0 to 2"),
    ):
        rank = 4 if world == 3 else 1
        with pytest.raises(ShardError, match=message):
            prepare_share(other, tokenizer, directory, rank=rank, world=world)
    with pytest.raises(ShardError, match=r"is shared by 5 ranks; run them with --rank and --world 5"):
        prepare_shards(config, english, directory)
    with Path(config.source, "a.jsonl").open("ab") as stream:
        stream.write(b"\n{}")
    with pytest.raises(SourceError, match=r"has changed since its reading began"):
        prepare_share(config, english, directory, rank=1, world=5)
    assert [status.rank for status in share_statuses(directory) if status.has_begun] == [0, 3]


def test_what_is_missing_is_named(
    begun: tuple[DataConfig, Path], english: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, directory = begun
    with pytest.raises(ShardError, match=r"cannot be merged yet: of 5 ranks, ranks 1-2, 4 have not begun; run"):
        merge_shares(directory)
    with pytest.raises(Interrupted):
        prepare_share(config, english, directory, rank=4, world=5, on_progress=interrupting(random.Random(1), most=2))
    for rank in (1, 2):
        prepare_share(config, english, directory, rank=rank, world=5)
    with pytest.raises(ShardError, match=r"of 5 ranks, rank 4 is not done \(\d+%\); run"):
        merge_shares(directory)
    monkeypatch.setattr(shares, "_LOCK_SECONDS", 0)

    def second(_: PreparationReport) -> None:
        with pytest.raises(ShardError, match=r"Rank 4 of .* is running in another process"):
            prepare_share(config, english, directory, rank=4, world=5)

    prepare_share(config, english, directory, rank=4, world=5, on_progress=second)
    monkeypatch.setattr(production, "_LOCK_SECONDS", 0)

    def merge_too(_: PreparationReport) -> None:
        with pytest.raises(ShardError, match="is being prepared by another process"):
            merge_shares(directory)

    merged = merge_shares(directory, on_progress=merge_too)
    for again in (merge_shares(directory), prepare_share(config, english, directory, rank=2, world=5)):
        assert replace(again, seconds=0) == replace(merged, seconds=0), "it is left as it is"
    assert share_statuses(directory) == []


def test_damaged_segment_is_named_with_the_way_out(source: Path, english: Tokenizer, tmp_path: Path) -> None:
    config = repeated_rows(source)
    expected = by_one(config, english, tmp_path / "one")
    for rank in range(2):
        prepare_share(config, english, tmp_path / "data", rank=rank, world=2)
    folder = tmp_path / "data" / "shares" / "rank-00001"
    segment = folder / "segment-00001.npz"
    whole = segment.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:400] + bytes([whole[400] ^ 1]) + whole[401:], b""):
        segment.write_bytes(damaged)
        with pytest.raises(
            ShardError, match=r"segment-00001.npz is damaged .* remove .*rank-00001, run that rank again"
        ):
            merge_shares(tmp_path / "data")
    segment.unlink()
    with pytest.raises(ShardError, match=r"segment-00001\.npz is missing"):
        merge_shares(tmp_path / "data")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    prepare_share(config, english, tmp_path / "data", rank=1, world=2)
    merge_shares(tmp_path / "data")
    assert files_of(tmp_path / "data") == expected


def test_directories_that_are_no_shared_preparation_are_refused(
    source: Path, english: Tokenizer, tmp_path: Path
) -> None:
    config = repeated_rows(source)
    with pytest.raises(Interrupted):
        prepare_shards(config, english, tmp_path / "one", on_progress=interrupting(random.Random(0), most=1))
    with pytest.raises(ShardError, match="was begun by one process; go on without a rank"):
        prepare_share(config, english, tmp_path / "one", rank=0, world=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(ShardError, match="holds no prepared data"):
        prepare_share(config, english, tmp_path / "other", rank=0, world=2)
    for name in ("other", "absent"):
        with pytest.raises(ShardError, match="holds nothing to merge"):
            merge_shares(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        prepare_share(changed(config, source=str(source / "absent.txt")), english, tmp_path / "new", rank=0, world=2)
    assert not (tmp_path / "new").exists()


def test_too_many_bad_rows_stop_the_merge_until_more_are_allowed(
    source: Path, english: Tokenizer, tmp_path: Path
) -> None:
    config = changed(many_forms(source), max_bad_share=0.01)
    for rank in range(2):
        prepare_share(config, english, tmp_path / "data", rank=rank, world=2)
    with pytest.raises(SourceError, match=r"more than the share of 0.01 that data.max_bad_share allows"):
        merge_shares(tmp_path / "data")
    merge_shares(tmp_path / "data", max_bad_share=1)
    assert files_of(tmp_path / "data") == by_one(changed(config, max_bad_share=1), english, tmp_path / "one")
    assert merging.missing_ranks(tmp_path / "data") == ""
