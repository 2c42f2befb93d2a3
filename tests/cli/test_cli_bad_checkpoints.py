"""Checkpoints and model directories that are damaged or made to do harm: each is refused by name, nothing of it is executed, and a run
goes on from the newest sound one.

The headers are of the kinds that the safetensors project keeps in its own corpus of attacks. Where a manifest is sealed, whoever made the
file has also made a manifest that agrees with it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_cli.importing import import_model
from anarcho_model import ModelConfig
from anarcho_model.torch import GPT
from anarcho_model.weights import load_pretrained, save_pretrained
from anarcho_tokenize import TokenizerConfig, train_tokenizer
from anarcho_train import CheckpointStore, TrainConfig
from anarcho_train.steps.torch import TorchStep
from safetensors.numpy import load_file, save_file

Damage = Callable[[Path], None]
WEIGHTS, OPTIMIZER, RUNTIME = "model.safetensors", "optimizer.safetensors", "runtime.safetensors"
MANIFEST, STATE = "manifest.json", "state.json"


def framed(header: bytes, data: bytes = b"\0" * 8, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensors(*entries: tuple[str, list[Any], list[Any]], data: bytes = b"\0" * 8, **metadata: Any) -> bytes:
    """A file of float32 tensors, ``(name, shape, offsets)`` each."""
    header: dict[str, Any] = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": offsets} for name, shape, offsets in entries
    }
    return framed(json.dumps(header | metadata).encode(), data)


ENTRY = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HEADERS = {
    "empty file": b"",
    "no header": b"\x08\0\0",
    "length beyond the file": framed(b'{"a":' + ENTRY + b"}", length=10_000),
    "length of 100 GB": framed(b"{}", length=10**11),
    "largest length": framed(b"{}", length=2**64 - 1),
    "negative length": framed(b"{}", length=2**63),
    "length of nothing": framed(b"", b""),
    "header that is cut": framed(b'{"a":' + ENTRY),
    "header that is no JSON": framed(b"not json at all!"),
    "header that is a list": framed(b"[1, 2, 3]"),
    "header of invalid UTF-8": framed(b'{"\xff\xfe":' + ENTRY + b"}"),
    "header nested beyond recursion": framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "name that occurs twice": framed(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}"),
    "overlapping tensors": tensors(("a", [2], [0, 8]), ("b", [2], [4, 12]), data=b"\0" * 12),
    "tensors in one place": tensors(("a", [2], [0, 8]), ("b", [2], [0, 8])),
    "hole between tensors": tensors(("a", [1], [0, 4]), ("b", [1], [8, 12]), data=b"\0" * 12),
    "hole before the first": tensors(("a", [1], [4, 8])),
    "bytes after the last": tensors(("a", [1], [0, 4])),
    "offsets beyond the file": tensors(("a", [1000], [0, 4000])),
    "negative offset": tensors(("a", [2], [-8, 0])),
    "offsets in reverse": tensors(("a", [2], [8, 0])),
    "offset that is a fraction": tensors(("a", [2], [0, 8.0])),
    "three offsets": tensors(("a", [2], [0, 8, 8])),
    "shape larger than its bytes": tensors(("a", [3], [0, 8])),
    "shape that overflows": tensors(("a", [2**62, 8], [0, 8])),
    "shape that overflows to nothing": tensors(("a", [2**32, 2**32], [0, 0]), data=b""),
    "negative shape": tensors(("a", [-1, -2], [0, 8])),
    "unknown type": framed(b'{"a":{"dtype":"OBJECT","shape":[1],"data_offsets":[0,8]}}'),
    "type that is no text": framed(b'{"a":{"dtype":{},"shape":[1],"data_offsets":[0,8]}}'),
    "entry without offsets": framed(b'{"a":{"dtype":"F32","shape":[2]}}'),
    "metadata that are numbers": tensors(("a", [2], [0, 8]), __metadata__={"format": 7}),
}


class Bomb:
    """Writes over the canary where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.write_text, (self.canary, "executed")


def replaced(name: str, content: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(content) and None


def cut(name: str, share: float) -> Damage:
    def apply(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(share * len(content))])

    return apply


def flipped(name: str, share: float) -> Damage:
    def apply(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[int(share * (len(content) - 1))] ^= 0x10
        (directory / name).write_bytes(content)

    return apply


def swapped(one: str, other: str) -> Damage:
    def apply(directory: Path) -> None:
        first, second = (directory / one).read_bytes(), (directory / other).read_bytes()
        (directory / one).write_bytes(second)
        (directory / other).write_bytes(first)

    return apply


def pickled(name: str) -> Damage:
    return lambda directory: (directory / name).write_bytes(pickle.dumps(Bomb(canary_of(directory)))) and None


def linked(name: str) -> Damage:
    """The file lies elsewhere, with the very bytes of before."""

    def apply(directory: Path) -> None:
        elsewhere = directory.parent.parent / f"elsewhere-{name}"
        (directory / name).rename(elsewhere)
        (directory / name).symlink_to(elsewhere)

    return apply


def changed(file: str, **values: Any) -> Damage:
    def apply(directory: Path) -> None:
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def naming(name: str) -> Damage:
    """The manifest names the canary, or what should not be there, as a file of the checkpoint."""

    def apply(directory: Path) -> None:
        canary = canary_of(directory)
        entry = {"size": canary.stat().st_size, "sha256": hashlib.sha256(canary.read_bytes()).hexdigest()}
        files = json.loads((directory / MANIFEST).read_text())["files"]
        changed(MANIFEST, files=files | {name.format(canary=canary): entry})(directory)

    return apply


def sealed(damage: Damage) -> Damage:
    """The same, with a manifest that agrees with it."""

    def apply(directory: Path) -> None:
        damage(directory)
        files = {
            path.relative_to(directory).as_posix(): {
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in directory.rglob("*")
            if path.is_file() and path.name != MANIFEST
        }
        changed(MANIFEST, files=files)(directory)

    return apply


def canary_of(directory: Path) -> Path:
    return directory.parent.parent / "canary"


BAD: dict[str, Damage] = {f"{name}, sealed": sealed(replaced(WEIGHTS, content)) for name, content in HEADERS.items()}
BAD |= {f"{name} cut at {share}": cut(name, share) for name in (WEIGHTS, OPTIMIZER, MANIFEST) for share in (0, 0.5)}
BAD |= {
    f"{name} with a flipped bit at {share}": flipped(name, share)
    for name in (WEIGHTS, OPTIMIZER, RUNTIME, STATE)
    for share in (0.0, 0.99)
}
BAD |= {f"{name} is gone": lambda d, name=name: (d / name).unlink() for name in (RUNTIME, STATE, MANIFEST)}
BAD |= {f"pickle for {name}, sealed": sealed(pickled(name)) for name in (WEIGHTS, OPTIMIZER, RUNTIME)}
BAD |= {f"link for {name}": linked(name) for name in (WEIGHTS, STATE, MANIFEST)}
BAD |= {
    "weights and optimizer in each other's place": swapped(WEIGHTS, OPTIMIZER),
    "manifest names a file above": naming("../../canary"),
    "manifest names an absolute file": naming("{canary}"),
    "manifest names a file by a detour": naming("./x/../../../canary"),
    "manifest of another step": changed(MANIFEST, step=3),
    "manifest of another format": changed(MANIFEST, format=99),
    "manifest without files": changed(MANIFEST, files={}),
    "manifest with a list of files": changed(MANIFEST, files=[WEIGHTS]),
    "manifest written in the year 10^300": changed(MANIFEST, created_at=1e300),
    "manifest that was never written": changed(MANIFEST, created_at=float("nan")),
    "manifest nested beyond recursion": replaced(MANIFEST, b'{"a":' * 100_000),
    "manifest with a number of a million digits": replaced(MANIFEST, b'{"step":' + b"9" * 1_000_000 + b"}"),
    "state of another step, sealed": sealed(changed(STATE, step=3)),
    "state with negative tokens, sealed": sealed(changed(STATE, tokens=-1)),
    "state with a list for an object, sealed": sealed(changed(STATE, recovery=[1])),
    "state with a text for a loss, sealed": sealed(changed(STATE, compared_loss="low")),
    "state nested beyond recursion, sealed": sealed(replaced(STATE, b"[" * 100_000)),
}

CONFIG = ModelConfig(vocab_size=320, context_length=16, dim=16, num_layers=1, num_heads=2)


def make_step() -> TorchStep:
    model = GPT(CONFIG)
    model.init_weights(seed=0)
    return TorchStep(
        model,
        torch.optim.AdamW(model.parameters()),
        config=TrainConfig(precision="float32", compile="off", batch_tokens=16),
        save_model=lambda m, directory: save_pretrained(m, directory, eos_token_id=1, pad_token_id=0),
        load_model=lambda m, directory: None,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two sound checkpoints, whose newer one is also a whole model directory."""
    run = tmp_path_factory.mktemp("sound")
    tokenizer = train_tokenizer(["the whale and the sea, the ship. " * 100], config=TokenizerConfig(vocab_size=285))
    step = make_step()
    store = CheckpointStore(run / "checkpoints")

    def write(directory: Path) -> None:
        step.save(directory)
        tokenizer.save(directory)

    for number in (3, 6):
        state = {"tokens": 16 * number, "samples": number, "early_stopping": {}, "compared_loss": 1.0 / number}
        store.save(number, write, state=state)
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "run")
    (tmp_path / "run" / "canary").write_text("alive")
    return tmp_path / "run"


def test_there_are_as_many_bad_checkpoints_as_promised_and_the_good_one_is_good(run):
    assert len(BAD) >= 64
    assert not CheckpointStore(run / "checkpoints").verify(run / "checkpoints" / "step-00000006")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_refused_by_name_and_the_run_goes_on_from_the_one_before(run, name):
    store = CheckpointStore(run / "checkpoints")
    bad = store.path(6)
    BAD[name](bad)
    problems, messages = store.verify(bad), []
    assert problems
    assert all(str(bad) in problem and len(problem) < 600 for problem in problems)
    newest = store.latest_valid(notify=messages.append)
    assert newest == store.path(3)
    assert len(messages) == 1
    assert str(bad) in messages[0]
    make_step().load(newest)
    assert [info.step for info in store.list() if info.valid] == [3]
    assert store.best() == store.path(3)
    assert (run / "canary").read_text() == "alive"


@pytest.mark.parametrize("name", [*HEADERS, "pickle"])
def test_a_model_directory_with_bad_weights_is_neither_loaded_nor_imported(run, tmp_path, name):
    bad = run / "checkpoints" / "step-00000006"
    (pickled(WEIGHTS) if name == "pickle" else replaced(WEIGHTS, HEADERS[name]))(bad)
    with pytest.raises((ValueError, OSError), match=WEIGHTS):
        load_pretrained(bad)
    with pytest.raises((ValueError, OSError), match=WEIGHTS):
        import_model(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (run / "canary").read_text() == "alive"


def test_what_the_library_writes_is_sound(tmp_path):
    from anarcho_train.tensor_header import header_problem

    kinds = {"f": np.float32, "d": np.float64, "h": np.float16, "i": np.int8, "u": np.uint64, "b": np.bool_}
    arrays = {name: np.zeros((2, 3), kind) for name, kind in kinds.items()}
    arrays |= {"scalar": np.zeros((), np.float32), "empty": np.zeros((0, 4), np.float32)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert header_problem(tmp_path / "x.safetensors") is None
    assert load_file(tmp_path / "x.safetensors").keys() == arrays.keys()
