"""Reading a Llama or Qwen3 from GGUF strictly: what this model would compute differently is refused by name, never ignored.

Notable: the file is mapped into memory and tensors are dequantised one at a time, so a reader needs room for its own copy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarcho_model.config import ConfigError, ModelConfig, RopeScaling
from anarcho_model.gguf.layout import ARCHITECTURES, ROPE_FACTORS, GgufError, gguf_names, load_gguf, to_halves

__all__ = ["GgufError", "GgufModel"]

_SHAPE = {
    "context_length": "context_length",
    "block_count": "num_layers",
    "embedding_length": "dim",
    "attention.head_count": "num_heads",
    "feed_forward_length": "hidden_dim",
}
"""Keys that every file has -> fields of `ModelConfig`."""
_READ = {
    *_SHAPE,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    # Of no effect on what is computed.
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192}
"""Llama 3.1's stretching, all that GGUF files with rope factors of a Llama hold; the file itself has only the results."""


class GgufModel:
    """An open GGUF file: its configuration, its tensors, and what it says of its tokenizer."""

    def __init__(self, path: str | Path) -> None:
        """Read everything but the tensors.

        Raises:
            FileNotFoundError: there is no such file.
            GgufError: it is damaged, or a model that this one cannot be.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected a GGUF file.")
        gguf = load_gguf()
        try:
            reader = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise GgufError(f"{path} is damaged or no GGUF file ({error}).") from error
        self._dequantize = gguf.quants.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        try:
            self.config = self._read_config()
        except ConfigError as error:
            raise GgufError(f"{path}: {error}") from error
        self._check_tensors()

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The values of all keys that begin with `tokenizer.`: texts, numbers and lists of them."""
        return {name: field.contents() for name, field in self._fields.items() if name.startswith("tokenizer.")}

    @property
    def facts(self) -> dict[str, Any]:
        """The values of all keys that begin with `general.`, such as the licence."""
        return {name: field.contents() for name, field in self._fields.items() if name.startswith("general.")}

    @property
    def element_types(self) -> tuple[str, ...]:
        """Names of the element types in the file, the most frequent first: `Q4_1`, `F32` and the like."""
        names = [tensor.tensor_type.name for tensor in self._tensors.values()]
        return tuple(sorted(set(names), key=lambda name: (-names.count(name), name)))

    def tensors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yield each tensor in float32, with its name in `model.safetensors`.

        Raises:
            GgufError: a tensor is of a type that cannot be dequantised, or holds another number of values than its shape.
        """
        for name, gguf_name in gguf_names(self.config).items():
            tensor = self._tensors[gguf_name]
            try:
                weight = self._dequantize(tensor.data, tensor.tensor_type).reshape(_shape(tensor))
            except (NotImplementedError, ValueError) as error:
                raise GgufError(
                    f"{self.path}: {gguf_name} of type {tensor.tensor_type.name} cannot be dequantised ({error})."
                ) from error
            # A copy, for what is read from the mapped file cannot be written to.
            yield name, np.array(to_halves(name, weight, self.config), dtype=np.float32, order="C")

    def _read_config(self) -> ModelConfig:
        architecture = self._value("general.architecture")
        if architecture not in ARCHITECTURES:
            raise ConfigError(f"general.architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}.")
        own = {
            name.removeprefix(f"{architecture}."): self._value(name)
            for name in self._fields
            if name.startswith(f"{architecture}.")
        }
        if unknown := sorted(own.keys() - _READ):
            raise ConfigError(
                f"{architecture}.{unknown[0]} is {own[unknown[0]]!r}, and this model has no such feature."
            )
        if missing := [name for name in _SHAPE if name not in own]:
            raise ConfigError(f"{architecture}.{missing[0]} is missing, expected the shape of a model.")
        if "token_embd.weight" not in self._tensors:
            raise ConfigError("the tensor token_embd.weight is missing.")
        return self._config(own, qk_norm=architecture == "qwen3")

    def _config(self, own: Mapping[str, Any], *, qk_norm: bool) -> ModelConfig:
        shape = {field: _whole(name, own[name]) for name, field in _SHAPE.items()}
        dim, heads = shape["dim"], shape["num_heads"]
        kv_heads = _whole("attention.head_count_kv", own.get("attention.head_count_kv", heads))
        head_dim = own.get("attention.key_length", dim // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if own.get(name, head_dim) != head_dim:
                raise ConfigError(
                    f"{name} is {own[name]}, and this model supports only the width {head_dim} of its heads."
                )
        theta = _shortest(own.get("rope.freq_base", 10000.0))
        return ModelConfig(
            vocab_size=_shape(self._tensors["token_embd.weight"])[0],
            context_length=shape["context_length"],
            num_layers=shape["num_layers"],
            dim=dim,
            num_heads=heads,
            num_kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if head_dim * heads == dim else head_dim,
            hidden_dim=None if shape["hidden_dim"] == 4 * dim else shape["hidden_dim"],
            norm_eps=_shortest(own.get("attention.layer_norm_rms_epsilon", 1e-5)),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(own, theta=theta, head_dim=head_dim),
            qk_norm=qk_norm,
            tie_embeddings="output.weight" not in self._tensors,
        )

    def _rope_scaling(self, own: Mapping[str, Any], *, theta: float, head_dim: int) -> RopeScaling | None:
        kind = own.get("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ConfigError(f"rope.scaling.type is {kind!r}, and this model supports only none and linear.")
        if kind == "linear":
            return RopeScaling(kind="linear", factor=_shortest(own.get("rope.scaling.factor", 1.0)))
        if ROPE_FACTORS not in self._tensors:
            return None
        found = np.asarray(self._tensors[ROPE_FACTORS].data, dtype=np.float64).reshape(-1)
        scaling = RopeScaling(kind="llama3", factor=_shortest(found.max()), **_LLAMA3)
        frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        expected = [frequency / scaling.scale(frequency) for frequency in frequencies]
        if len(found) != len(expected) or not np.allclose(found, expected, rtol=1e-4):
            raise ConfigError(f"{ROPE_FACTORS} stretches rotary frequencies by other rules than Llama 3.1's.")
        return scaling

    def _check_tensors(self) -> None:
        shapes, names = self.config.tensor_shapes(), gguf_names(self.config)
        expected = {names[name]: shape for name, shape in shapes.items()}
        problems = [f"{name} is missing" for name in expected if name not in self._tensors]
        for name, tensor in self._tensors.items():
            if name not in expected:
                problems += [] if name == ROPE_FACTORS else [f"{name} is unexpected"]
            elif _shape(tensor) != expected[name]:
                problems.append(f"{name} has shape {_shape(tensor)}, expected {expected[name]}")
        if problems:
            raise GgufError(f"{self.path} does not hold the weights of its configuration: {'; '.join(problems)}.")

    def _value(self, name: str) -> Any:
        return self._fields[name].contents() if name in self._fields else None


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF writes the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}, expected one whole number for all layers.")
    return value


def _shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
