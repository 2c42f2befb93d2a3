"""Shards: every document is kept with its end-of-text, readers see whole shards alone while they grow, and damage is named."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anarcho_tokenize import ShardError, Tokenizer, TokenShards, inspect_shards, shards, write_shards
from anarcho_tokenize.shard_writer import ShardWriter
from anarcho_tokenize.shards import token_type
from hypothesis import given, settings
from hypothesis import strategies as st

DOCUMENTS = [f"Document {number} of the whale. " * (number % 7 + 1) for number in range(60)]


HEADER = {
    "format": "anarcho-token-shards",
    "version": 2,
    "kind": "text",
    "tokenizer_sha256": "0" * 64,
    "vocab_size": 70_000,
    "eot_id": 1,
    "pad_id": 2,
    "source": "numbers",
    "plan_sha256": "1" * 64,
}


class Growing:
    """A part that is written shard by shard, of documents that are as long as their number's last digit and 1."""

    def __init__(self, directory: Path, **header: object) -> None:
        self.writer = ShardWriter(directory, header=HEADER | header, shards=())
        self.writer.write_index(complete=False)
        self.documents = 0

    def append(self, *, documents: int = 3, complete: bool = False) -> None:
        for number in range(self.documents, self.documents + documents):
            ids = np.full(number % 10 + 1, 60_000 + number, dtype=np.int32)
            is_text = self.writer.token_bytes == 4
            self.writer.add(ids, None if is_text else (np.arange(len(ids)) % 2).astype(np.uint8), num_bytes=2)
        self.documents += documents
        self.writer.close_shard()
        self.writer.write_index(complete=complete)

    def evict(self, number: int) -> None:
        assert self.writer.evict(1, before=sum(shard["tokens"] for shard in self.writer.shards[: number + 1]))
        self.writer.write_index(complete=False)
        self.writer.delete_evicted()


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard_tokens", [1, 50, 10**6])
def test_documents_come_back_in_order_whatever_the_shard_size(
    prepare: Callable[..., TokenShards], english: Tokenizer, shard_tokens: int
) -> None:
    shards = prepare(DOCUMENTS, shard_tokens=shard_tokens)
    expected = [i for document in DOCUMENTS for i in (*english.encode(document), english.eot_id)]
    assert shards.tokens(0, shards.num_tokens).tolist() == expected
    assert (shards.num_tokens, shards.num_documents) == (len(expected), len(DOCUMENTS))
    assert shards.num_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    starts = shards.document_starts()
    for number, document in enumerate(DOCUMENTS):
        assert english.decode(shards.tokens(starts[number], starts[number + 1]).tolist()) == document
    shards.verify()


def test_any_range_equals_the_slice_of_the_whole(prepare: Callable[..., TokenShards]) -> None:
    shards = prepare(DOCUMENTS, shard_tokens=100)
    whole = shards.tokens(0, shards.num_tokens)
    generator = np.random.default_rng(0)
    for start, stop in np.sort(generator.integers(0, shards.num_tokens + 1, size=(200, 2))).tolist():
        assert np.array_equal(shards.tokens(start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**9)])
def test_ranges_outside_the_tokens_are_refused(prepare: Callable[..., TokenShards], start: int, stop: int) -> None:
    with pytest.raises(ShardError, match=r"expected a range within 0 to \d+"):
        prepare(DOCUMENTS, shard_tokens=400).tokens(start, stop)


def test_ids_are_stored_little_endian_in_two_bytes_or_four() -> None:
    assert [token_type(size).str for size in (300, 65535, 65536, 128_000)] == ["<u2", "<u2", "<u4", "<u4"]


def test_files_have_the_documented_form(prepare: Callable[..., TokenShards], english: Tokenizer) -> None:
    shards = prepare(["a", "b\n"], shard_tokens=100)
    folder = shards.directory
    assert sorted(file.name for file in folder.iterdir()) == ["index.json", "shard-00000.bin", "shard-00000.idx"]
    ids = [*english.encode("a"), 1, *english.encode("b\n"), 1]
    assert (folder / "shard-00000.bin").read_bytes() == b"".join(i.to_bytes(2, "little") for i in ids)
    assert (folder / "shard-00000.idx").read_bytes() == b"".join(i.to_bytes(8, "little") for i in (0, 2, 5))
    index = json.loads((folder / "index.json").read_text())
    assert index["tokenizer_sha256"] == english.sha256
    assert index["shards"][0]["sha256"] == hashlib.sha256((folder / "shard-00000.bin").read_bytes()).hexdigest()


def test_equal_data_has_an_equal_fingerprint_wherever_it_is_from(english: Tokenizer, tmp_path: Path) -> None:
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS), ("c", DOCUMENTS[1:])):
        write_shards(documents, english, tmp_path / name, validation_fraction=0, source=f"/somewhere/{name}")
    prints = [TokenShards.open(tmp_path / name / "train").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert TokenShards.open(tmp_path / "a" / "train").source == "/somewhere/a"


def test_no_validation_gives_empty_validation_shards(prepare: Callable[..., TokenShards]) -> None:
    empty = TokenShards.open(prepare(["one"]).directory.parent / "validation")
    assert (empty.num_tokens, empty.num_documents, empty.num_bytes) == (0, 0, 0)
    assert empty.tokens(0, 0).tolist() == []
    assert empty.document_starts().tolist() == [0]
    empty.verify()


def test_every_damaged_file_is_named(prepare: Callable[..., TokenShards]) -> None:
    shards = prepare(DOCUMENTS, shard_tokens=400)
    for name in ("shard-00001.bin", "shard-00003.idx"):
        data = bytearray((shards.directory / name).read_bytes())
        data[3] ^= 1
        (shards.directory / name).write_bytes(data)
    with pytest.raises(ShardError, match=r"sha256 of shard-00001\.bin, shard-00003\.idx is not the one"):
        TokenShards.open(shards.directory).verify()


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.idx"])
def test_truncated_and_missing_files_are_named_when_opened(prepare: Callable[..., TokenShards], name: str) -> None:
    file = prepare(DOCUMENTS, shard_tokens=400).directory / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ShardError, match=rf"{name} has \d+ bytes; expected \d+"):
        TokenShards.open(file.parent)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing, but index\.json lists it"):
        TokenShards.open(file.parent)


def test_directory_without_an_index_says_what_to_open(prepare: Callable[..., TokenShards], tmp_path: Path) -> None:
    parent = prepare(DOCUMENTS, shard_tokens=400).directory.parent
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing; .* open .*train"):
        TokenShards.open(parent)
    with pytest.raises(FileNotFoundError, match=r"prepare the data first"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["../shard-00000", "/etc/passwd", "a/shard-00000", "shard-00000/../x", "", None, "shard-00000\n"]
)
def test_names_that_are_not_plain_are_refused(prepare: Callable[..., TokenShards], name: object) -> None:
    folder = prepare(DOCUMENTS, shard_tokens=400).directory
    edit_index(folder, lambda index: index["shards"][0].update(name=name))
    with pytest.raises(ShardError, match=r"lists the shard .* expected plain names such as 'shard-00000'"):
        TokenShards.open(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.update(format="other"), "not an index of token shards"),
        (lambda index: index.update(version=99), "has version 99; expected 2"),
        (lambda index: index.update(vocab_size="many"), "'many' as 'vocab_size'; expected a whole number"),
        (lambda index: index.update(vocab_size=1), "a token outside the vocabulary"),
        (lambda index: index.update(tokens=-1), "-1 as 'tokens'"),
        (lambda index: index.update(tokens=True), "True as 'tokens'"),
        (lambda index: index.update(documents=1), "1 as 'documents', not the sum"),
        (lambda index: index.pop("tokenizer_sha256"), "None as 'tokenizer_sha256'; expected a sha256"),
        (lambda index: index.pop("shards"), "lacks 'source' or 'shards'"),
        (lambda index: index["shards"][0].update(sha256="beef"), "'beef' as 'sha256'"),
        (lambda index: index.update(kind="poem"), "'poem' as 'kind'; expected text, chat or preference"),
        (lambda index: index.update(complete=1), "1 as 'complete'; expected true or false"),
        (lambda index: index.pop("plan_sha256"), "None as 'plan_sha256'; expected a sha256"),
        (lambda index: index["shards"][0].pop("evicted"), "None as 'evicted'; expected true or false"),
        (lambda index: index.update(kind="chat"), "None as 'mask_sha256'; expected a sha256"),
        (lambda index: index["shards"].append("x"), "lists the shard 'x'"),
        (
            lambda index: index["shards"].append({**index["shards"][0], "tokens": 0, "documents": 0, "bytes": 0}),
            "an empty shard",
        ),
    ],
)
def test_wrong_index_is_refused_by_what_is_wrong(
    prepare: Callable[..., TokenShards], change: Callable[[dict], object], problem: str
) -> None:
    folder = prepare(DOCUMENTS, shard_tokens=400).directory
    edit_index(folder, change)
    with pytest.raises(ShardError, match=problem):
        TokenShards.open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_index_that_is_no_index_is_refused(prepare: Callable[..., TokenShards], content: bytes) -> None:
    folder = prepare(DOCUMENTS, shard_tokens=400).directory
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"index\.json is not"):
        TokenShards.open(folder)


@settings(max_examples=15, deadline=None)
@given(documents=st.lists(st.text(max_size=30), min_size=1, max_size=12).filter(any), shard_tokens=st.integers(1, 40))
def test_any_documents_survive_the_way_through_shards(
    english: Tokenizer, tmp_path_factory: pytest.TempPathFactory, documents: list[str], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("data") / "data"
    write_shards(documents, english, folder, validation_fraction=0, shard_tokens=shard_tokens)
    shards = TokenShards.open(folder / "train")
    kept = [document for document in documents if document]
    text = english.decode(shards.tokens(0, shards.num_tokens).tolist(), skip_special_tokens=False)
    assert text == "".join(f"{document}<|endoftext|>" for document in kept)
    assert np.diff(shards.document_starts()).tolist() == [len(english.encode(document)) + 1 for document in kept]


def test_report_describes_the_shards(prepare: Callable[..., TokenShards], english: Tokenizer) -> None:
    shards = prepare(DOCUMENTS, shard_tokens=400)
    report = inspect_shards(shards, english, first_tokens=4)
    assert (report.documents, report.tokens, report.bytes) == (60, shards.num_tokens, shards.num_bytes)
    assert report.bytes_per_token == pytest.approx(shards.num_bytes / shards.num_tokens)
    lengths = sorted(len(english.encode(document)) + 1 for document in DOCUMENTS)
    assert report.length_quantiles[0.0] == lengths[0]
    assert report.length_quantiles[0.5] == lengths[29]
    assert report.length_quantiles[1.0] == lengths[-1]
    assert report.first_document == english.decode(english.encode(DOCUMENTS[0])[:4])
    assert inspect_shards(shards).first_document is None


def test_report_refuses_another_tokenizer(prepare: Callable[..., TokenShards], mixed: Tokenizer) -> None:
    with pytest.raises(ShardError, match=rf"not {mixed.sha256[:12]}; give the tokenizer of its run"):
        inspect_shards(prepare(DOCUMENTS, shard_tokens=400), mixed)


def test_report_of_empty_shards_has_no_quantiles(prepare: Callable[..., TokenShards], english: Tokenizer) -> None:
    report = inspect_shards(TokenShards.open(prepare(["one"]).directory.parent / "validation"), english)
    assert (report.documents, report.length_quantiles, report.first_document, report.bytes_per_token) == (
        0,
        {},
        None,
        0.0,
    )


def test_readers_of_a_growing_part_see_whole_shards_and_then_its_end(tmp_path: Path) -> None:
    part = Growing(tmp_path)
    with pytest.raises(ShardError, match=r"is not complete: its preparation was interrupted; run it again"):
        TokenShards.open(tmp_path)
    growing = TokenShards.open(tmp_path, growing=True)
    assert (growing.num_tokens, growing.complete, growing.document_starts().tolist()) == (0, False, [0])
    part.append()
    assert growing.num_tokens == 0, "nothing changes but by refresh()"
    growing.refresh()
    first = growing.tokens(0, 6).tolist()
    assert first == [60_000, *[60_001] * 2, *[60_002] * 3]
    part.append(complete=True)
    growing.refresh()
    assert (growing.num_tokens, growing.complete) == (21, True)
    assert growing.tokens(0, 6).tolist() == first
    assert growing.document_starts().tolist() == [0, 1, 3, 6, 10, 15, 21]
    assert growing.shard_documents(1).tolist() == [6, 10, 15, 21]
    assert growing.shard_starts == [0, 6, 21]
    growing.verify()
    assert TokenShards.open(tmp_path).fingerprint == growing.fingerprint


def test_reader_beside_a_writer_never_sees_half_of_anything(tmp_path: Path) -> None:
    part = Growing(tmp_path)
    growing = TokenShards.open(tmp_path, growing=True)

    def write() -> None:
        for number in range(60):
            part.append(documents=10, complete=number == 59)

    thread = threading.Thread(target=write)
    thread.start()
    seen = {0}
    while not growing.complete:
        growing.refresh()
        seen.add(growing.num_documents)
        assert growing.num_tokens == growing.num_documents // 10 * 55
        if growing.num_tokens:
            assert (
                growing.tokens(growing.num_tokens - 10, growing.num_tokens).tolist()
                == [59_999 + growing.num_documents] * 10
            )
    thread.join()
    assert len(seen) > 3
    assert np.diff(growing.document_starts()).tolist() == [*range(1, 11)] * 60


def test_masks_are_stored_beside_the_tokens_of_conversations(tmp_path: Path) -> None:
    part = Growing(tmp_path, kind="chat")
    part.append(documents=4)
    part.append(documents=4, complete=True)
    talks = TokenShards.open(tmp_path)
    expected = np.concatenate([np.arange(number + 1) % 2 for number in range(8)])
    assert np.array_equal(talks.loss_mask(0, 36), expected)
    assert np.array_equal(talks.loss_mask(7, 20), expected[7:20])
    assert (tmp_path / "shard-00000.mask").read_bytes() == bytes(expected[:10].tolist())
    talks.verify()
    (tmp_path / "shard-00001.mask").write_bytes(b"\1" * 26)
    with pytest.raises(ShardError, match=r"sha256 of shard-00001\.mask is not the one"):
        talks.verify()
    (tmp_path / "shard-00001.mask").write_bytes(b"\1" * 25)
    with pytest.raises(ShardError, match=r"shard-00001\.mask has 25 bytes; expected 26"):
        TokenShards.open(tmp_path)


def test_every_token_of_a_text_is_a_target(prepare: Callable[..., TokenShards]) -> None:
    texts = prepare(DOCUMENTS, shard_tokens=400)
    mask = texts.loss_mask(3, 70)
    assert (mask.dtype, mask.tolist()) == (np.uint8, [1] * 67)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask"])
def test_damage_to_a_growing_part_is_named_at_the_first_use(tmp_path: Path, suffix: str) -> None:
    part = Growing(tmp_path, kind="preference")
    part.append(documents=4)
    part.append(documents=4)
    file = tmp_path / f"shard-00001{suffix}"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    growing = TokenShards.open(tmp_path, growing=True)
    uses = {".bin": growing.tokens, ".mask": growing.loss_mask, ".idx": lambda *_: growing.document_starts()}
    if suffix != ".idx":
        assert len(uses[suffix](0, 10)) == 10, "what is before the damage can be read"
    with pytest.raises(ShardError, match=rf"shard-00001\{suffix} is damaged: its sha256 is not the one"):
        uses[suffix](8, 12)


def test_evicted_tokens_are_refused_and_all_else_is_as_before(tmp_path: Path) -> None:
    part = Growing(tmp_path, kind="chat")
    for _ in range(3):
        part.append()
    growing = TokenShards.open(tmp_path, growing=True)
    before = growing.fingerprint, growing.document_starts().tolist(), growing.tokens(6, 8).tolist()
    part.evict(0)
    assert not (tmp_path / "shard-00000.bin").exists()
    assert not (tmp_path / "shard-00000.mask").exists()
    growing.refresh()
    for reader in (growing, TokenShards.open(tmp_path, growing=True)):
        assert [reader.is_evicted(number) for number in range(3)] == [True, False, False]
        assert (reader.fingerprint, reader.document_starts().tolist(), reader.tokens(6, 8).tolist()) == before
        reader.verify()
        for read in (reader.tokens, reader.loss_mask):
            with pytest.raises(
                ShardError, match=r"shard-00000 of .* was deleted to keep data\.disk_budget; .* new run"
            ):
                read(5, 7)


def test_eviction_between_index_and_files_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Growing(tmp_path)
    part.append()
    part.append()
    read_index = shards._read_index

    def slow(folder: Path) -> Any:
        found = read_index(folder)
        if not part.writer.shards[0]["evicted"]:
            part.evict(0)
        return found

    monkeypatch.setattr(shards, "_read_index", slow)
    growing = TokenShards.open(tmp_path, growing=True)
    assert growing.is_evicted(0)
    (tmp_path / "shard-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.bin is missing"):
        TokenShards.open(tmp_path, growing=True)


def test_part_that_is_prepared_anew_is_refused_by_its_reader(tmp_path: Path) -> None:
    part = Growing(tmp_path)
    part.append()
    part.append()
    growing = TokenShards.open(tmp_path, growing=True)
    anew = Growing(tmp_path)
    with pytest.raises(ShardError, match=r"was prepared anew while it was read"):
        growing.refresh()
    anew.append(documents=5)
    with pytest.raises(ShardError, match=r"was prepared anew while it was read"):
        growing.refresh()


def test_index_is_not_replaced_by_an_equal_one(tmp_path: Path) -> None:
    part = Growing(tmp_path)
    part.append()
    before = (tmp_path / "index.json").stat()
    part.writer.write_index(complete=False)
    ShardWriter(tmp_path, header=HEADER, shards=part.writer.shards).write_index(complete=False)
    assert (tmp_path / "index.json").stat() == before


def test_writer_removes_what_was_not_committed(tmp_path: Path) -> None:
    part = Growing(tmp_path)
    part.append()
    part.append()
    part.writer.add(np.array([1], dtype=np.int32), None, num_bytes=1)
    committed = part.writer.shards[:1]
    ShardWriter(tmp_path, header=HEADER, shards=committed)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.json", "shard-00000.bin", "shard-00000.idx"]
    part.writer.discard()
