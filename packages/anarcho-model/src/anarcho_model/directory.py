"""The model directory: which files it holds, and what is checked before any framework reads a weight.

Notable: the checks need only the header of the weights file, so a wrong file is refused with one sentence before
    anything is allocated. Tensors are safetensors, everything else JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from anarcho_model.config import ConfigError, ModelConfig

__all__ = [
    "CONFIG_FILE",
    "GENERATION_FILE",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "DirectoryError",
    "WeightHeaders",
    "check_shapes",
    "load_config",
    "load_stop_token_ids",
    "opened",
    "weight_files",
    "write_config_files",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class DirectoryError(ValueError):
    """A model directory that cannot be read; the message names the file, what was found and what was expected."""


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` of a Llama or Qwen3.

    Raises:
        FileNotFoundError: there is no such file.
        DirectoryError: it is not JSON, or describes a model that this one cannot be.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        return ModelConfig.from_huggingface(_read_json(path))
    except ConfigError as error:
        raise DirectoryError(f"{path}: {error}") from error


def load_stop_token_ids(directory: str | Path) -> tuple[int, ...]:
    """Ids that end a text, from `generation_config.json`, or where it is missing from `config.json`; empty if none is named."""
    path = Path(directory) / GENERATION_FILE
    if not path.is_file():
        path = Path(directory) / CONFIG_FILE
    found = _read_json(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise DirectoryError(f"{path}: eos_token_id is {found!r}, expected a token id or a list of them.")
    return tuple(ids)


def weight_files(directory: str | Path) -> tuple[Path, ...]:
    """The files that hold a model's weights: `model.safetensors`, or those that `model.safetensors.index.json` names.

    Raises:
        FileNotFoundError: there is neither, or a file that the index names is missing.
        DirectoryError: the index is not valid, or names a file outside of the directory.
    """
    directory = Path(directory)
    if (directory / WEIGHTS_FILE).is_file():
        return (directory / WEIGHTS_FILE,)
    index = directory / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory / WEIGHTS_FILE} not found, expected it or {INDEX_FILE} beside {CONFIG_FILE}."
        )
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise DirectoryError(
            f"{index}: weight_map is {str(places)[:40]}, expected names of tensors and of their files."
        )
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise DirectoryError(f"{index} names the file {name!r}, expected a file of the same directory.")
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} not found, expected it because {INDEX_FILE} names it.")
    return tuple(directory / name for name in names)


@contextmanager
def opened(path: Path, *, framework: str) -> Iterator[Any]:
    """A weights file of safetensors, whose tensors are read as `framework`'s; DirectoryError where it is damaged."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise DirectoryError(f"{path} is damaged ({error}), expected a safetensors file.") from error


class WeightHeaders:
    """Which tensors a directory holds and where, whether in one file or in several; no tensor is read."""

    def __init__(self, directory: str | Path) -> None:
        """Open the files and read their headers.

        Raises:
            FileNotFoundError: a file is missing.
            DirectoryError: one is damaged, or two hold the same tensor.
        """
        self.paths = weight_files(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Name of each tensor -> its shape."""
        self.homes: dict[str, Path] = {}
        """Name of each tensor -> its file."""
        self.described_by = self.paths[0] if len(self.paths) == 1 else Path(directory) / INDEX_FILE
        """The file that names all tensors."""
        for path in self.paths:
            with opened(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    if name in self.homes:
                        raise DirectoryError(f"{path} and {self.homes[name]} both hold {name}, expected it once.")
                    self.homes[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def check(self, config: ModelConfig, *, equal: Callable[[str, str], bool]) -> None:
        """Compare with what the configuration describes; `equal` says whether two tensors are.

        Tied weights may be stored twice, but only if both say the same. Raises DirectoryError.
        """
        check_shapes(self.shapes, config, path=self.described_by)
        if config.tie_embeddings and HEAD in self.shapes and not equal(HEAD, EMBEDDING):
            raise DirectoryError(
                f"{self.described_by} holds an {HEAD} that differs from {EMBEDDING}, expected equal ones because "
                "config.json says tie_word_embeddings; set it to false to load both."
            )


def write_config_files(
    config: ModelConfig,
    directory: str | Path,
    *,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    dtype: str,
) -> None:
    """Write `config.json` and `generation_config.json` into an existing directory; `dtype` is the weights' element type."""
    values = config.to_huggingface(eos_token_id=eos_token_id, pad_token_id=pad_token_id, dtype=dtype)
    generation = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in ((CONFIG_FILE, values), (GENERATION_FILE, generation)):
        (Path(directory) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_shapes(found: Mapping[str, Sequence[int]], config: ModelConfig, *, path: Path) -> None:
    """Compare the shapes of a weights file with the configuration's; a redundant tied output layer is let through.

    Raises:
        DirectoryError: naming every missing, unexpected or mis-shaped tensor.
    """
    expected = config.tensor_shapes()
    allowed = {HEAD: expected[EMBEDDING]} if config.tie_embeddings else {}
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        wanted = expected.get(name, allowed.get(name))
        if wanted is None:
            problems.append(f"{name} is unexpected")
        elif tuple(shape) != wanted:
            problems.append(f"{name} has shape {tuple(shape)}, expected {wanted}")
    if problems:
        raise DirectoryError(f"{path} does not hold the weights that {CONFIG_FILE} describes: {'; '.join(problems)}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} not found, expected a model directory with a {CONFIG_FILE}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DirectoryError(f"{path} is not valid JSON ({error}), expected an object.") from error
    if not isinstance(values, dict):
        raise DirectoryError(f"{path} holds {type(values).__name__}, expected an object.")
    return values
