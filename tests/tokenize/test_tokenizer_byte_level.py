"""Byte-level tokenizers have the interface of all others, agree with transformers, and survive the way through GGUF's metadata."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from anarcho_tokenize import (
    ByteLevelTokenizer,
    DataConfig,
    StreamDecoder,
    Tokenizer,
    TokenizerConfig,
    TokenizerError,
    TokenShards,
    encode_chat,
    encode_conversation,
    inspect_tokenizer,
    load_tokenizer,
    prepare_shards,
    train_tokenizer,
)
from anarcho_tokenize import byte_level as module
from anarcho_tokenize.gguf_fields import differences, fields_of, tokenizer_of_fields
from transformers import AutoTokenizer

TEXTS = [
    "",
    "Call me Ishmael. Some years ago - never mind how long precisely 1851 12",
    "  two  spaces\n\n\tand\r\ntabs  ",
    "日本語のテキスト Привет naïve café 😀👩‍👩‍👧 \u2581 \x00",
    "<|im_end|> and <|endoftext|> are text",
]
MESSAGES = [{"role": "user", "content": "Hi<|im_end|>"}, {"role": "assistant", "content": "Hello, you."}]
PADDING = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def definition(chapters: list[str]) -> dict:
    """What the tokenizer.json of a small SmolLM would hold."""
    steps = tokenizers.pre_tokenizers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = steps.Sequence([steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=steps.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(chapters[:20], trainer)
    return json.loads(made.to_str())


@pytest.fixture(scope="session")
def byte_level(definition: dict) -> ByteLevelTokenizer:
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": PADDING}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", **settings, "chat_template": TEMPLATE}
    return ByteLevelTokenizer.of(definition, own)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_whole_and_in_a_stream(text: str, byte_level: ByteLevelTokenizer) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    stream = StreamDecoder(byte_level)
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()
    assert not {byte_level.eot_id, byte_level.special_tokens["<|im_end|>"]} & set(ids)


def test_ids_and_saved_files_are_those_of_transformers(byte_level: ByteLevelTokenizer, tmp_path: Path) -> None:
    byte_level.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:-1]:
        assert byte_level.encode(text) == theirs.encode(text, add_special_tokens=False)
    plain = [{**message, "content": message["content"].replace("<|im_end|>", "!")} for message in MESSAGES]
    for prompt in (True, False):
        rendered = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        expected = theirs.encode(rendered, add_special_tokens=False)
        assert encode_chat(byte_level, plain, add_generation_prompt=prompt) == expected


def test_it_is_the_same_tokenizer_after_saving_and_in_another_process(byte_level, tmp_path: Path) -> None:
    byte_level.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteLevelTokenizer)
    assert again.model_bytes == byte_level.model_bytes == ByteLevelTokenizer(byte_level.model_bytes).model_bytes
    assert (again.eot_id, again.pad_id, again.eos_id) == (0, 2, 2)


def test_a_directory_with_both_kinds_of_files_is_a_sentencepiece_model(english: Tokenizer, tmp_path: Path) -> None:
    english.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    assert load_tokenizer(tmp_path / "tokenizer.model").sha256 == english.sha256


def test_masks_are_one_at_answers_and_their_end(byte_level: ByteLevelTokenizer) -> None:
    ids, mask = encode_conversation(byte_level, MESSAGES)
    assert ids.tolist() == encode_chat(byte_level, MESSAGES)
    learned = byte_level.decode(ids[mask == 1], skip_special_tokens=False)
    assert learned == "Hello, you.<|im_end|>"
    assert (ids == byte_level.special_tokens["<|im_end|>"]).sum() == 2, "a content yields no special token"


def test_long_texts_have_the_ids_of_the_whole(byte_level, chapters, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(chapters[:3]) + "".join(random.Random(0).choices("ab  \n.'s7", k=5000))
    whole = byte_level.encode_array(text)
    monkeypatch.setattr(module, "_STRETCH_CHARACTERS", 100)
    assert len(list(byte_level._stretches(text))) > 100
    np.testing.assert_array_equal(byte_level.encode_array(text), whole)


def test_shards_are_prepared_and_reported_with_it(byte_level, chapters: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(chapters[0])
    config = DataConfig(source=str(tmp_path / "text.txt"), validation_fraction=0, num_workers=0)
    prepare_shards(config, byte_level, tmp_path / "data")
    shards = TokenShards.open(tmp_path / "data" / "train")
    assert shards.tokenizer_sha256 == byte_level.sha256
    ids = np.asarray(shards.tokens(0, shards.num_tokens))
    assert byte_level.decode(ids[:-1]) == chapters[0]
    assert ids[-1] == byte_level.eot_id
    report = inspect_tokenizer(byte_level, chapters[:1])
    assert report.tokens == shards.num_tokens - 1


def test_the_metadata_of_gguf_hold_it_whole(byte_level: ByteLevelTokenizer) -> None:
    fields = fields_of(byte_level, vocab_size=byte_level.vocab_size + 3)
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 603
    again = tokenizer_of_fields(fields, name="x.gguf")
    assert [again.encode(text) for text in TEXTS] == [byte_level.encode(text) for text in TEXTS]
    assert encode_chat(again, MESSAGES) == encode_chat(byte_level, MESSAGES)
    assert fields_of(again, vocab_size=603) == fields
    assert differences(again) == []


@pytest.mark.parametrize("user_symbols", [(), ("<tool>", "ab")])
def test_the_metadata_of_gguf_hold_a_sentencepiece_model_whole(user_symbols, chapters: list[str]) -> None:
    settings = TokenizerConfig(vocab_size=500, user_symbols=user_symbols)
    tokenizer = train_tokenizer(chapters[:5], config=settings)
    fields = fields_of(tokenizer, vocab_size=512)
    again = tokenizer_of_fields(fields, name="x.gguf")
    texts = [*TEXTS, "above <tool> about", chapters[6]]
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert again.special_tokens == tokenizer.special_tokens
    assert (again.eot_id, again.pad_id, again.bos_id) == (tokenizer.eot_id, tokenizer.pad_id, tokenizer.bos_id)
    assert fields_of(again, vocab_size=512) == fields


def test_what_gguf_cannot_hold_is_refused_or_named(chapters: list[str], byte_level: ByteLevelTokenizer) -> None:
    learned = io.BytesIO()
    lines = [line for chapter in chapters[:3] for line in chapter.splitlines()]
    settings = {"model_type": "unigram", "vocab_size": 300, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=learned, **settings)
    with pytest.raises(TokenizerError, match="unigram; expected bpe"):
        fields_of(Tokenizer(learned.getvalue()), vocab_size=500)
    with pytest.raises(TokenizerError, match="has 10 tokens; expected at least"):
        fields_of(byte_level, vocab_size=10)
    composed = train_tokenizer(chapters[:5], config=TokenizerConfig(vocab_size=500, normalization="nfc"))
    assert any("nfc" in sentence for sentence in differences(composed))
    with pytest.raises(TokenizerError, match=r"ggml\.model 'bert'"):
        tokenizer_of_fields({"tokenizer.ggml.model": "bert"}, name="x.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": None}, "no pre-tokenizer of type 'ByteLevel'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "expected add_prefix_space false"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer of type 'Lowercase'"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "type 'WordPiece'; expected byte-level 'BPE'"),
    ],
)
def test_other_encodings_are_refused_by_name(change: dict, message: str, definition: dict) -> None:
    with pytest.raises(TokenizerError, match=message):
        ByteLevelTokenizer.of({**definition, **change}, {"eos_token": "<|im_end|>"})


def test_damaged_and_absent_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)
