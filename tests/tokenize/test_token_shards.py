"""Shards: every document is kept with its end-of-text, files are whole or absent, and damage is named."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from anarcho_tokenize import DataConfig, ShardError, Tokenizer, TokenShards, inspect_shards, prepare_shards
from anarcho_tokenize.shards import token_type
from hypothesis import given, settings
from hypothesis import strategies as st

DOCUMENTS = [f"Document {number} of the whale. " * (number % 7 + 1) for number in range(60)]


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
    shards = prepare(DOCUMENTS, shard_tokens=40)
    whole = shards.tokens(0, shards.num_tokens)
    generator = np.random.default_rng(0)
    for start, stop in np.sort(generator.integers(0, shards.num_tokens + 1, size=(200, 2))).tolist():
        assert np.array_equal(shards.tokens(start, stop), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 10**9)])
def test_ranges_outside_the_tokens_are_refused(prepare: Callable[..., TokenShards], start: int, stop: int) -> None:
    with pytest.raises(ShardError, match=r"expected a range within 0 to \d+"):
        prepare(DOCUMENTS).tokens(start, stop)


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


def test_validation_is_chosen_by_the_text_alone(english: Tokenizer, tmp_path: Path) -> None:
    def validation_texts(documents: list[str], name: str) -> list[str]:
        prepare_shards(documents, english, tmp_path / name, validation_fraction=0.3)
        shards = TokenShards.open(tmp_path / name / "validation")
        starts = shards.document_starts()
        return [english.decode(shards.tokens(a, b).tolist()) for a, b in pairwise(starts)]

    chosen = validation_texts(DOCUMENTS, "all")
    assert 5 < len(chosen) < 35
    assert validation_texts([*DOCUMENTS[::-1], "another", ""], "reversed") in (chosen[::-1], [*chosen[::-1], "another"])
    expected = [text for text in DOCUMENTS if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.3 * 2**64]
    assert chosen == expected
    train = TokenShards.open(tmp_path / "all" / "train")
    assert train.num_documents == len(DOCUMENTS) - len(chosen)


def test_larger_fraction_keeps_the_smaller_ones_documents() -> None:
    from anarcho_tokenize.preparation import is_validation

    few = {text for text in DOCUMENTS if is_validation(text, fraction=0.1)}
    many = {text for text in DOCUMENTS if is_validation(text, fraction=0.5)}
    assert few < many


def test_equal_data_has_an_equal_fingerprint_wherever_it_is_from(english: Tokenizer, tmp_path: Path) -> None:
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS), ("c", DOCUMENTS[1:])):
        prepare_shards(
            documents, english, tmp_path / name, validation_fraction=0, source=f"/somewhere/{name}", num_threads=2
        )
    prints = [TokenShards.open(tmp_path / name / "train").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert TokenShards.open(tmp_path / "a" / "train").source == "/somewhere/a"


def test_failing_source_leaves_nothing_behind(english: Tokenizer, tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield from DOCUMENTS
        raise OSError("the cable was pulled")

    with pytest.raises(OSError, match="the cable was pulled"):
        prepare_shards(failing(), english, tmp_path / "data", shard_tokens=10)
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_attempt_are_replaced(english: Tokenizer, tmp_path: Path) -> None:
    remains = tmp_path / ".data.partial" / "train"
    remains.mkdir(parents=True)
    (remains / "shard-00000.bin").write_bytes(b"half")
    (tmp_path / "data").mkdir()
    prepare_shards(DOCUMENTS, english, tmp_path / "data", validation_fraction=0)
    TokenShards.open(tmp_path / "data" / "train").verify()
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


KILLED_AT_EVERY_STEP = """
import builtins, os, pathlib, shutil, signal, sys
from anarcho_tokenize import Tokenizer, TokenShards, prepare_shards

tokenizer, target = Tokenizer.load(sys.argv[1]), pathlib.Path(sys.argv[2])
documents = [f"Document {number}" for number in range(40)]


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

    for owner, name in ((os, "fsync"), (pathlib.Path, "replace"), (pathlib.Path, "open"), (builtins, "open")):
        setattr(owner, name, counted(getattr(owner, name)))


def attempt(step):
    child = os.fork()
    if child == 0:
        die_at(step)
        prepare_shards(documents, tokenizer, target, validation_fraction=0.3, shard_tokens=60, num_threads=1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


step, complete = 1, 0
while attempt(step) == signal.SIGKILL:
    if target.exists():
        parts = [TokenShards.open(target / part) for part in ("train", "validation")]
        assert sum(part.num_documents for part in parts) == 40
        [part.verify() for part in parts]
        shutil.rmtree(target)
        complete += 1
    step += 1
assert sorted(entry.name for entry in target.parent.iterdir()) == [target.name]
print(step - 1, complete)
"""


def test_killed_at_any_step_leaves_all_or_nothing_and_the_next_attempt_succeeds(
    english: Tokenizer, tmp_path: Path
) -> None:
    english.save(tmp_path / "tokenizer")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(tmp_path / "tokenizer"), str(tmp_path / "work" / "data")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    kills, complete = map(int, run.stdout.split())
    assert kills > 20
    assert complete == 1  # only the last step, which makes the new name durable, comes after the rename


@pytest.mark.parametrize("occupant", ["data/train/index.json", "data"])
def test_used_directory_is_never_overwritten(english: Tokenizer, tmp_path: Path, occupant: str) -> None:
    (tmp_path / occupant).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / occupant).write_text("precious")
    with pytest.raises(ShardError, match="already exists and is not an empty directory"):
        prepare_shards(DOCUMENTS, english, tmp_path / "data")
    assert (tmp_path / occupant).read_text() == "precious"


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_source_without_documents_is_refused(english: Tokenizer, tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(ShardError, match="The source holds no document"):
        prepare_shards(documents, english, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("fraction", "part"), [(0.0001, "validation"), (0.9999, "train")])
def test_part_without_documents_is_refused_with_a_way_out(
    english: Tokenizer, tmp_path: Path, fraction: float, part: str
) -> None:
    with pytest.raises(ShardError, match=rf"None of the 1 documents fell into {part} with .*data\.document_separator"):
        prepare_shards(["one"], english, tmp_path / "data", validation_fraction=fraction)


def test_no_validation_gives_empty_validation_shards(prepare: Callable[..., TokenShards]) -> None:
    empty = TokenShards.open(prepare(["one"]).directory.parent / "validation")
    assert (empty.num_tokens, empty.num_documents, empty.num_bytes) == (0, 0, 0)
    assert empty.tokens(0, 0).tolist() == []
    assert empty.document_starts().tolist() == [0]
    empty.verify()


def test_every_damaged_file_is_named(prepare: Callable[..., TokenShards]) -> None:
    shards = prepare(DOCUMENTS)
    for name in ("shard-00001.bin", "shard-00003.idx"):
        data = bytearray((shards.directory / name).read_bytes())
        data[3] ^= 1
        (shards.directory / name).write_bytes(data)
    with pytest.raises(ShardError, match=r"sha256 of shard-00001\.bin, shard-00003\.idx is not the one"):
        TokenShards.open(shards.directory).verify()


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.idx"])
def test_truncated_and_missing_files_are_named_when_opened(prepare: Callable[..., TokenShards], name: str) -> None:
    file = prepare(DOCUMENTS).directory / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ShardError, match=rf"{name} has \d+ bytes; expected \d+"):
        TokenShards.open(file.parent)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing, but index\.json lists it"):
        TokenShards.open(file.parent)


def test_directory_without_an_index_says_what_to_open(prepare: Callable[..., TokenShards], tmp_path: Path) -> None:
    parent = prepare(DOCUMENTS).directory.parent
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing; .* open .*train"):
        TokenShards.open(parent)
    with pytest.raises(FileNotFoundError, match=r"prepare the data first"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["../shard-00000", "/etc/passwd", "a/shard-00000", "shard-00000/../x", "", None, "shard-00000\n"]
)
def test_names_that_are_not_plain_are_refused(prepare: Callable[..., TokenShards], name: object) -> None:
    folder = prepare(DOCUMENTS).directory
    edit_index(folder, lambda index: index["shards"][0].update(name=name))
    with pytest.raises(ShardError, match=r"lists the shard .* expected plain names such as 'shard-00000'"):
        TokenShards.open(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.update(format="other"), "not an index of token shards"),
        (lambda index: index.update(version=99), "has version 99; expected 1"),
        (lambda index: index.update(vocab_size="many"), "'many' as 'vocab_size'; expected a whole number"),
        (lambda index: index.update(vocab_size=1), "a token outside the vocabulary"),
        (lambda index: index.update(tokens=-1), "-1 as 'tokens'"),
        (lambda index: index.update(tokens=True), "True as 'tokens'"),
        (lambda index: index.update(documents=1), "1 as 'documents', not the sum"),
        (lambda index: index.pop("tokenizer_sha256"), "None as 'tokenizer_sha256'; expected a sha256"),
        (lambda index: index.pop("shards"), "lacks 'source' or 'shards'"),
        (lambda index: index["shards"][0].update(sha256="beef"), "'beef' as 'sha256'"),
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
    folder = prepare(DOCUMENTS).directory
    edit_index(folder, change)
    with pytest.raises(ShardError, match=problem):
        TokenShards.open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_index_that_is_no_index_is_refused(prepare: Callable[..., TokenShards], content: bytes) -> None:
    folder = prepare(DOCUMENTS).directory
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"index\.json is not"):
        TokenShards.open(folder)


@settings(max_examples=15, deadline=None)
@given(documents=st.lists(st.text(max_size=30), min_size=1, max_size=12).filter(any), shard_tokens=st.integers(1, 40))
def test_any_documents_survive_the_way_through_shards(
    english: Tokenizer, tmp_path_factory: pytest.TempPathFactory, documents: list[str], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare_shards(documents, english, folder, validation_fraction=0, shard_tokens=shard_tokens, num_threads=1)
    shards = TokenShards.open(folder / "train")
    kept = [document for document in documents if document]
    text = english.decode(shards.tokens(0, shards.num_tokens).tolist(), skip_special_tokens=False)
    assert text == "".join(f"{document}<|endoftext|>" for document in kept)
    assert np.diff(shards.document_starts()).tolist() == [len(english.encode(document)) + 1 for document in kept]


def test_report_describes_the_shards(prepare: Callable[..., TokenShards], english: Tokenizer) -> None:
    shards = prepare(DOCUMENTS)
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
        inspect_shards(prepare(DOCUMENTS), mixed)


def test_report_of_empty_shards_has_no_quantiles(prepare: Callable[..., TokenShards], english: Tokenizer) -> None:
    report = inspect_shards(TokenShards.open(prepare(["one"]).directory.parent / "validation"), english)
    assert (report.documents, report.length_quantiles, report.first_document, report.bytes_per_token) == (
        0,
        {},
        None,
        0.0,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("validation_fraction", 1.0),
        ("validation_fraction", -0.1),
        ("shard_tokens", 0),
        ("num_threads", 0),
        ("document_separator", ""),
    ],
)
def test_configuration_names_the_wrong_field(field: str, value: object) -> None:
    with pytest.raises(ShardError, match=rf"data\.{field} is .*; expected"):
        DataConfig(**{field: value})


def test_the_end_of_a_single_document_is_kept_from_training(english, tmp_path):
    text = "".join(f"This is line number {number} of one long text.\n" for number in range(200))
    prepare_shards([text], english, tmp_path / "data", validation_fraction=0.1)
    parts = {part: TokenShards.open(tmp_path / "data" / part) for part in ("train", "validation")}
    decoded = {part: english.decode(shards.tokens(0, shards.num_tokens).tolist()) for part, shards in parts.items()}
    assert decoded["train"] + decoded["validation"] == text
    assert decoded["train"].endswith("\n")
    assert 0.08 < len(decoded["validation"]) / len(text) < 0.12
