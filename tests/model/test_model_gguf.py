"""A model survives the way through GGUF, Transformers reads the same from it, and what cannot be read is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from anarcho_model import ModelConfig, RopeScaling
from anarcho_model.gguf.layout import gguf_names, to_halves, to_pairs
from anarcho_model.torch import GPT
from transformers import AutoModelForCausalLM

gguf = pytest.importorskip("gguf")
from anarcho_model.gguf.reading import GgufError, GgufModel  # noqa: E402 - without the package there is nothing to test
from anarcho_model.gguf.writing import ELEMENT_TYPES, write_gguf  # noqa: E402

LLAMA3 = RopeScaling(kind="llama3", factor=4.0)


def tokenizer_of(config: ModelConfig) -> dict[str, object]:
    """A vocabulary of as many tokens as the model has."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(config.vocab_size)],
        "tokenizer.ggml.scores": [float(-number) for number in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [1] * config.vocab_size,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }


def write(model: GPT, path: Path, *, element_type: str = "f32") -> Path:
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    write_gguf(
        model.config,
        weights.__getitem__,
        path,
        tokenizer=tokenizer_of(model.config),
        element_type=element_type,
        name="small",
    )
    return path


def read(path: Path) -> GPT:
    opened = GgufModel(path)
    model = GPT(opened.config)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in opened.tensors()})
    return model


def test_configuration_weights_and_vocabulary_come_back_exactly(model, tmp_path):
    path = write(model, tmp_path / "model.gguf")
    again = read(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.config.tensor_shapes() == model.config.tensor_shapes()
    assert (again.config.norm_eps, again.config.rope_theta) == (model.config.norm_eps, model.config.rope_theta)
    assert again.config.context_length == model.config.context_length
    assert GgufModel(path).tokenizer == tokenizer_of(model.config)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_kv_heads": 2}, {"qk_norm": True, "num_kv_heads": 1}], ids=["llama", "qwen3"])
def test_transformers_computes_the_same_logits_from_the_file(build, options, tmp_path):
    model = build(**options)
    write(model, tmp_path / "model.gguf")
    # Transformers does not read the width of a Qwen3's heads from the file.
    settings = {"head_dim": model.config.head_size, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **settings).eval()
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("element_type", "error"),
    [
        ("f16", 2e-3),
        ("bf16", 2e-2),
        ("q8_0", 2e-2),
        ("q5_1", 4e-2),
        ("q5_0", 8e-2),
        ("q4_1", 8e-2),
        ("q4_0", 2e-1),
    ],
)
def test_smaller_types_round_and_leave_norms_alone(build, element_type, error, tmp_path):
    model = build(hidden_dim=48)
    again = read(write(model, tmp_path / "model.gguf", element_type=element_type)).state_dict()
    for name, tensor in model.state_dict().items():
        largest = 0 if tensor.dim() == 1 else error * tensor.abs().max()
        assert (again[name] - tensor).abs().max() <= largest, name


def test_matrices_without_whole_blocks_are_written_as_float16(build, tmp_path):
    path = write(build(hidden_dim=48), tmp_path / "model.gguf", element_type="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize("element_type", ["q5_1", "q5_0", "q4_1", "q4_0"])
def test_in_small_types_the_embedding_stays_wider(build, element_type, tmp_path):
    path = write(build(hidden_dim=64), tmp_path / "model.gguf", element_type=element_type)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["token_embd.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", element_type.upper())
    assert types["output_norm.weight"] == "F32"


@pytest.mark.parametrize("element_type", ["q4_k", "q4_k_m", "Q6_K", "iq4_xs", "tq1_0", "mxfp4"])
def test_for_types_that_only_llama_cpp_makes_its_command_is_named(build, element_type, tmp_path):
    with pytest.raises(GgufError, match=rf"q4_0; for {element_type}, .*`llama-quantize .* {element_type.upper()}`"):
        write(build(), tmp_path / "model.gguf", element_type=element_type)


@pytest.mark.parametrize("scaling", [RopeScaling(kind="linear", factor=3.0), LLAMA3], ids=lambda scaling: scaling.kind)
def test_stretched_rotary_frequencies_come_back(build, scaling, tmp_path):
    model = build(rope_scaling=scaling, rope_theta=500000.0)
    assert read(write(model, tmp_path / "model.gguf")).config.rope_scaling == scaling


def test_rotary_factors_of_other_rules_are_refused(build, tmp_path):
    model = build(rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_context_length=20))
    with pytest.raises(GgufError, match=r"rope_freqs\.weight stretches .* other rules than Llama 3\.1's"):
        GgufModel(write(model, tmp_path / "model.gguf"))


def test_the_order_of_rows_is_that_of_llama_cpp():
    config = ModelConfig(vocab_size=8, num_layers=1, dim=8, num_heads=2, num_kv_heads=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert to_pairs(name, rows, config).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert to_halves(name, to_pairs(name, rows, config), config).ravel().tolist() == list(range(8))
    other = "model.layers.0.self_attn.v_proj.weight"
    assert to_pairs(other, rows, config) is rows


def test_every_tensor_has_the_name_that_gguf_itself_gives_it(model):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_layers)
    for name, found in gguf_names(model.config).items():
        assert names.get_name(name, try_suffixes=(".weight",)) == found


def altered(path: Path, *, key: str, value: object) -> Path:
    """A file of nothing but metadata, with one more key."""
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("context_length", "block_count", "embedding_length", "feed_forward_length"):
        getattr(writer, f"add_{name}")(8)
    writer.add_head_count(1)
    if isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.expert_count", 8, r"llama\.expert_count is 8, and this model has no such feature"),
        ("llama.rope.scaling.type", "yarn", r"rope\.scaling\.type is 'yarn'"),
        ("llama.rope.dimension_count", 2, r"rope\.dimension_count is 2"),
        ("llama.vocab_size", 4, r"output_norm\.weight is missing"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(key, value, message, tmp_path):
    with pytest.raises(GgufError, match=message):
        GgufModel(altered(tmp_path / "model.gguf", key=key, value=value))


def test_other_architectures_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma")
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    with pytest.raises(GgufError, match=r"architecture is 'gemma', expected one of llama, qwen3"):
        GgufModel(tmp_path / "model.gguf")


def test_damaged_and_absent_files_are_refused_by_name(build, tmp_path):
    path = write(build(), tmp_path / "model.gguf")
    whole = path.read_bytes()
    for size in (0, 3, 40, 2000, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(GgufError, match=r"model\.gguf"):
            GgufModel(path)
    path.write_bytes(b"safetensors" * 10)
    with pytest.raises(GgufError, match=r"model\.gguf is damaged or no GGUF file"):
        GgufModel(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf is missing"):
        GgufModel(tmp_path / "absent.gguf")


def test_a_file_is_written_only_whole_and_only_where_none_is(build, tmp_path):
    model, path = build(), tmp_path / "model.gguf"
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    settings = {"tokenizer": tokenizer_of(model.config), "name": "small"}
    with pytest.raises(GgufError, match=f"expected one of {', '.join(ELEMENT_TYPES)}"):
        write_gguf(model.config, weights.__getitem__, path, element_type="int4", **settings)
    with pytest.raises(GgufError, match=r"holds 0 tokens, expected the model's 67"):
        write_gguf(model.config, weights.__getitem__, path, tokenizer={}, name="small")
    assert not path.exists()
    path.touch()
    with pytest.raises(FileExistsError, match=r"model\.gguf exists already"):
        write_gguf(model.config, weights.__getitem__, path, **settings)
