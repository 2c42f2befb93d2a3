"""Writing a model as GGUF, which llama.cpp and what is built on it run.

Notable: tensors are taken one at a time. Norms stay float32 in every type, as in llama.cpp's own files; a matrix whose rows are no
    multiple of the 32 values of a block is written as float16. In the types of 4 and 5 bits, the embedding and the output layer are
    Q8_0, for they suffer most (llama.cpp keeps them wider, too). The k-quants are left to `llama-quantize`, for the library `gguf`
    reads them only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarcho_model.config import ModelConfig
from anarcho_model.gguf.layout import ROPE_FACTORS, GgufError, gguf_names, load_gguf, to_pairs

__all__ = ["ELEMENT_TYPES", "GgufError", "check_element_type", "write_gguf"]

_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
"""Numbers of llama.cpp's `general.file_type`."""
ELEMENT_TYPES = tuple(_FILE_TYPES)
_LEFT_TO_LLAMA_CPP = re.compile(r"(q[2-6]_k|iq[1-4]|tq[12]_).*|mxfp4|nvfp4")
"""Types that the library only reads, or that are for models which were trained for them."""
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")
_BLOCK_VALUES = 32


def write_gguf(
    config: ModelConfig,
    read_tensor: Callable[[str], npt.NDArray[np.float32]],
    path: str | Path,
    *,
    tokenizer: Mapping[str, Any],
    element_type: str = "f16",
    name: str,
    licence: str | None = None,
) -> None:
    """Write a model to the file `path`, which must not be there yet.

    `read_tensor` gives a tensor by its name in `model.safetensors`; `tokenizer` holds values for keys that begin with `tokenizer.`.

    Raises:
        GgufError: `element_type` is none of ELEMENT_TYPES, or the tokenizer has another number of tokens than the model.
    """
    check_element_type(element_type)
    tokens = len(tokenizer.get("tokenizer.ggml.tokens", ()))
    if tokens != config.vocab_size:
        raise GgufError(f"tokenizer.ggml.tokens holds {tokens} tokens, expected the model's {config.vocab_size}.")
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already; choose another place.")
    gguf = load_gguf()
    architecture = "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type("model")
        writer.add_name(name)
        if licence is not None:
            writer.add_license(licence)
        writer.add_file_type(_FILE_TYPES[element_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_config(writer, config, gguf.RopeScalingType.LINEAR)
        for key, value in tokenizer.items():
            _add_value(writer, key, value)
        _write_tensors(gguf, writer, config, read_tensor, element_type)
    finally:
        writer.close()


def check_element_type(name: str) -> None:
    """Raise GgufError for a type that cannot be written, with the way there where llama.cpp has it."""
    if name in ELEMENT_TYPES:
        return
    known = f"the type is {name!r}, expected one of {', '.join(ELEMENT_TYPES)}"
    if _LEFT_TO_LLAMA_CPP.fullmatch(name.lower()):
        raise GgufError(
            f"{known}; for {name}, write f16 and run llama.cpp's `llama-quantize model.gguf small.gguf {name.upper()}`."
        )
    raise GgufError(f"{known}.")


def _add_config(writer: Any, config: ModelConfig, linear: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(linear)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add_value(writer: Any, key: str, value: Any) -> None:
    # A truth value is a whole number, too, for Python.
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (str, writer.add_string), (float, writer.add_float32))
    add = next((add for kind, add in kinds if isinstance(value, kind)), writer.add_array)
    add(key, value)


def _write_tensors(
    gguf: Any,
    writer: Any,
    config: ModelConfig,
    read_tensor: Callable[[str], npt.NDArray[np.float32]],
    element_type: str,
) -> None:
    """Announce every tensor, then write one after the other."""
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    names, shapes = gguf_names(config), config.tensor_shapes()
    types = {
        name: gguf.GGMLQuantizationType[_type_of(name, shape, element_type).upper()] for name, shape in shapes.items()
    }
    for name, shape in shapes.items():
        kind = types[name]
        byte_shape = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(byte_shape))
        writer.add_tensor_info(names[name], byte_shape, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name in shapes:
        weight = np.ascontiguousarray(to_pairs(name, read_tensor(name), config), dtype=np.float32)
        writer.write_tensor_data(gguf.quantize(weight, types[name]))


def _type_of(name: str, shape: tuple[int, ...], element_type: str) -> str:
    if len(shape) == 1:
        return "f32"
    if not element_type.startswith("q"):
        return element_type
    if shape[-1] % _BLOCK_VALUES:
        return "f16"
    return "q8_0" if name in _OUTER else element_type


def _rope_factors(config: ModelConfig) -> npt.NDArray[np.float32] | None:
    """What llama.cpp divides each rotary frequency by; None where the metadata says all."""
    scaling, head = config.rope_scaling, config.head_size
    if scaling is None or scaling.kind != "llama3":
        return None
    frequencies = [config.rope_theta ** (-2 * i / head) for i in range(head // 2)]
    return np.array([frequency / scaling.scale(frequency) for frequency in frequencies], dtype=np.float32)
