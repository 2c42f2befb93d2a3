"""llama.cpp reads what `anarcho export --to gguf` writes: equal ids, prompts and text; where llama-cpp-python is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import load_pretrained, save_pretrained
from anarcho_tokenize import (
    TokenizerConfig,
    embedded_documents,
    encode_chat,
    load_tokenizer,
    spell_chat,
    train_tokenizer,
)

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

TEXTS = [
    "Call me Ishmael. Some years ago - never mind how long precisely 1851",
    "  two  spaces\n\n\tand\r\ntabs  ",
    " ",
    "日本語 Привет naïve café 😀👩‍👩‍👧 e\u0301 ½ \x01\x7f\ufffd",
    "<|end|> and <|endoftext|> and <0x0A> and <unk> are text",
    "if(a<b){c++;}\n\n\n  don't I'LL",
]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Who are you? "},
    {"role": "assistant", "content": "Ishmael.\n"},
    {"role": "user", "content": "And the whale?"},
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with random weights of both architectures, with a tokenizer of this project."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(list(embedded_documents())[:8], config=TokenizerConfig(vocab_size=600))
    made = {}
    for name, options in {"llama": {}, "qwen3": {"qk_norm": True, "head_dim": 64}}.items():
        shape = {"num_layers": 2, "dim": 64, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 96, **options}
        network = GPT(ModelConfig(vocab_size=608, context_length=128, **shape))
        network.init_weights(seed=1, init=InitConfig(embedding_std=0.5, zero_residual_outputs=False))
        made[name] = folder / name
        save_pretrained(network, made[name], eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
        tokenizer.save(made[name])
    return made


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    # Keys and values in float32, as they are here; llama.cpp's own choice is float16.
    wide = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False, type_k=wide, type_v=wide)
    try:
        yield model
    finally:
        model.close()


def logits_of(model: Any, ids: Sequence[int]) -> np.ndarray:
    model.reset()
    model.eval(list(ids))
    return np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()])


def greedy(logits: Any, prompt: Sequence[int], *, count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(logits(ids))))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_ids_prompts_and_greedy_text_are_equal(name: str, directories, anarcho, tmp_path: Path) -> None:
    directory = directories[name]
    exported = anarcho("export", directory, "--to", "gguf", "--type", "f32", "--out", tmp_path / "x.gguf")
    assert exported.exit_code == 0, exported.output
    tokenizer, ours = load_tokenizer(directory), load_pretrained(directory)
    with opened(tmp_path / "x.gguf") as theirs, torch.no_grad():
        for text in TEXTS:
            assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = theirs.metadata["tokenizer.chat_template"]
        prompt = Jinja2ChatFormatter(template=template, eos_token="", bos_token="")(messages=TALK).prompt
        assert prompt == spell_chat(tokenizer, TALK, add_generation_prompt=True)
        ids = encode_chat(tokenizer, TALK, add_generation_prompt=True)
        assert theirs.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        assert theirs.token_eos() == tokenizer.eot_id
        np.testing.assert_allclose(logits_of(theirs, ids), ours(torch.tensor([ids]))[0, -1].numpy(), atol=1e-3)
        expected = greedy(lambda given: ours(torch.tensor([given]))[0, -1].numpy(), ids, count=16)
        assert greedy(lambda given: logits_of(theirs, given), ids, count=16) == expected


@pytest.mark.parametrize("element_type", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_type_is_read_with_the_weights_that_an_import_finds(element_type, directories, anarcho, tmp_path) -> None:
    anarcho("export", directories["llama"], "--to", "gguf", "--type", element_type, "--out", tmp_path / "x.gguf")
    imported = anarcho("import", tmp_path / "x.gguf", "--out", tmp_path / "again")
    assert imported.exit_code == 0, imported.output
    ids = load_tokenizer(tmp_path / "again").encode(TEXTS[0])
    with opened(tmp_path / "x.gguf") as theirs, torch.no_grad():
        found = logits_of(theirs, ids)
        expected = load_pretrained(tmp_path / "again")(torch.tensor([ids]))[0, -1].numpy()
    # llama.cpp multiplies by activations of fewer bits, too.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
