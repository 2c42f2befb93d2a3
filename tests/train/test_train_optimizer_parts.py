"""The optimizer's state in parts: any number of parts is the whole, each reader takes the rows that it needs, and odd files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anarcho_train import CheckpointStore, StepSchedule
from anarcho_train.optimizer_layout import LayoutError, part_name, read_layout, rows_note
from anarcho_train.steps.files import OPTIMIZER_FILE
from anarcho_train.steps.stored_state import StoredState, stored_state
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors import torch as torch_files
from safetensors.numpy import load_file, save_file

from .conftest import CountingText
from .test_train_recovery import bits, mlx_step, torch_step

STATE = {
    "layer.weight.momentum": np.arange(35, dtype=np.float32).reshape(7, 5),
    "layer.bias.exp_avg": np.arange(3, dtype=np.float32),
    "layer.bias.step": np.array(4, dtype=np.float32),
}


def in_parts(directory: Path, state: dict[str, np.ndarray], count: int) -> None:
    """Writes the state as `count` processes do: each its rows, as torch.chunk cuts them, and the first one the scalars."""
    for number in range(count):
        tensors, notes = {}, {}
        for name, array in state.items():
            rows = array.shape[0] if array.ndim else 0
            chunk = -(-rows // count)
            first = min(rows, number * chunk)
            if array.ndim == 0 and number == 0:
                tensors[name] = array
            elif first < rows:
                tensors[name], notes[name] = array[first : first + chunk], (first, rows)
        save_file(tensors, directory / part_name(number, count), metadata=rows_note(notes))


def opened(directory: Path) -> StoredState:
    return StoredState(directory, lambda path: safe_open(path, framework="np").__enter__(), np.concatenate)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_any_number_of_parts_is_the_whole_state(tmp_path, count):
    in_parts(tmp_path, STATE, count)
    stored = opened(tmp_path)
    assert stored.layouts.keys() == STATE.keys()
    for name, array in STATE.items():
        assert stored.layouts[name].shape == array.shape
        np.testing.assert_array_equal(stored.tensor(name), array)


@given(parts=st.integers(1, 9), first=st.integers(0, 6), more=st.integers(1, 7))
def test_any_rows_are_those_of_the_whole_whoever_wrote_them(tmp_path_factory, parts, first, more):
    directory = tmp_path_factory.mktemp("parts")
    in_parts(directory, STATE, parts)
    name = "layer.weight.momentum"
    last = min(7, first + more)
    np.testing.assert_array_equal(opened(directory).rows(name, first, last), STATE[name][first:last])
    shutil.rmtree(directory)


def test_rows_that_one_part_has_are_read_from_that_file_alone(tmp_path):
    in_parts(tmp_path, STATE, 4)
    for number in (0, 2, 3):
        path = tmp_path / part_name(number, 4)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        path.write_bytes(path.read_bytes()[:header] + b"\xff" * (path.stat().st_size - header))
    name = "layer.weight.momentum"
    np.testing.assert_array_equal(opened(tmp_path).rows(name, 2, 4), STATE[name][2:4])


@pytest.mark.parametrize("make_step", [torch_step, mlx_step], ids=["torch", "mlx"])
def test_a_step_goes_on_from_parts_as_from_the_whole(make_step, tmp_path):
    step, text = make_step(), CountingText()
    for number in range(2):
        step.train([text.batch(8 * number, 8)], schedule=StepSchedule(lr_scale=1.0, number=number))
    step.save(tmp_path)
    state = load_file(tmp_path / OPTIMIZER_FILE)
    (tmp_path / OPTIMIZER_FILE).unlink()
    in_parts(tmp_path, state, 3)
    other = make_step()
    other.load(tmp_path)
    for either in (step, other):
        either.train([text.batch(16, 8)], schedule=StepSchedule(lr_scale=1.0, number=2))
    assert bits(other) == bits(step)


def narrowed(state: dict[str, np.ndarray], directory: Path, *, parts: int) -> dict[str, np.ndarray]:
    """Writes the state with its moments in bfloat16, as lean training has them, whole or in two parts; the numbers that are then there."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    tensors = {name: tensor.bfloat16() if tensor.ndim else tensor for name, tensor in tensors.items()}
    if parts == 1:
        torch_files.save_file(tensors, directory / OPTIMIZER_FILE)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}
    cut = {name: tensor.shape[0] // 2 for name, tensor in tensors.items() if tensor.ndim}
    for number in range(2):
        own, notes = {}, {}
        for name, first in cut.items():
            own[name] = tensors[name][first:].clone() if number else tensors[name][:first].clone()
            notes[name] = (first if number else 0, tensors[name].shape[0])
        own |= {name: tensor for name, tensor in tensors.items() if not (tensor.ndim or number)}
        torch_files.save_file(own, directory / part_name(number, 2), metadata=rows_note(notes))
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("make_step", [torch_step, mlx_step], ids=["torch", "mlx"])
def test_a_state_in_bfloat16_is_read_number_by_number_into_one_of_float32(make_step, parts, tmp_path):
    step, text = make_step(), CountingText()
    step.train([text.batch(0, 8)], schedule=StepSchedule(lr_scale=1.0, number=0))
    step.save(tmp_path)
    state = load_file(tmp_path / OPTIMIZER_FILE)
    (tmp_path / OPTIMIZER_FILE).unlink()
    expected = narrowed(state, tmp_path, parts=parts)
    assert any((expected[name] != array).any() for name, array in state.items())

    other = make_step()
    other.load(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    other.save(again)
    found = load_file(again / OPTIMIZER_FILE)
    assert {name: array.dtype for name, array in found.items()} == {n: array.dtype for n, array in state.items()}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array.astype(state[name].dtype), err_msg=name)


def rewritten(name: str, change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    """The part with other tensors or notes, in a file that is itself sound."""

    def apply(directory: Path) -> None:
        with safe_open(directory / name, framework="np") as file:
            notes = json.loads(file.metadata()["rows"])
        tensors = load_file(directory / name)
        change(tensors, notes)
        save_file(tensors, directory / name, metadata={"rows": json.dumps(notes)})

    return apply


FIRST, SECOND, LAST = (part_name(number, 3) for number in range(3))
MOMENTUM = "layer.weight.momentum"
DAMAGE = {
    "a part that is missing": (lambda d: (d / SECOND).unlink(), rf"{SECOND} is missing, one of 3 parts"),
    "the last part missing": (lambda d: (d / LAST).unlink(), rf"{LAST} is missing, one of 3 parts"),
    "a part of another count": (
        lambda d: shutil.copy(d / FIRST, d / part_name(0, 4)),
        r"optimizer-00001-of-00004.safetensors is no part",
    ),
    "a part beyond the count": (
        lambda d: shutil.copy(d / FIRST, d / "optimizer-00004-of-00003.safetensors"),
        r"optimizer-00004-of-00003.safetensors is no part",
    ),
    "a part of no parts": (
        lambda d: [path.unlink() for path in d.iterdir()] + [save_file({}, d / "optimizer-00001-of-00000.safetensors")],
        "is no part",
    ),
    "a file with such a name": (lambda d: shutil.copy(d / FIRST, d / "optimizer-new.safetensors"), "optimizer-new"),
    "the whole beside its parts": (
        lambda d: shutil.copy(d / FIRST, d / OPTIMIZER_FILE),
        r"is there beside optimizer-00001-of-00003.safetensors",
    ),
    "a gap": (
        rewritten(SECOND, lambda tensors, notes: notes.update({MOMENTUM: [4, 7]})),
        rf"{SECOND} holds {MOMENTUM} from row 4; expected 3",
    ),
    "an overlap": (
        rewritten(SECOND, lambda tensors, notes: notes.update({MOMENTUM: [2, 7]})),
        rf"{SECOND} holds {MOMENTUM} from row 2; expected 3",
    ),
    "the last rows missing": (
        rewritten(LAST, lambda tensors, notes: (tensors.pop(MOMENTUM), notes.pop(MOMENTUM))),
        rf"{SECOND} ends {MOMENTUM} with row 6; expected 7",
    ),
    "rows beyond the end": (
        rewritten(LAST, lambda tensors, notes: notes.update({MOMENTUM: [7, 7]})),
        rf"{LAST} holds rows 7 to 8 of {MOMENTUM}, which has 7",
    ),
    "another number of rows": (
        rewritten(LAST, lambda tensors, notes: notes.update({MOMENTUM: [6, 9]})),
        rf"{LAST} holds {MOMENTUM} as rows of shape \(9, 5\); expected \(7, 5\)",
    ),
    "another width": (
        rewritten(LAST, lambda tensors, notes: tensors.update({MOMENTUM: np.zeros((1, 4), np.float32)})),
        rf"{LAST} holds {MOMENTUM} as rows of shape \(7, 4\); expected \(7, 5\)",
    ),
    "two scalars": (
        rewritten(LAST, lambda tensors, notes: tensors.update({"layer.bias.step": STATE["layer.bias.step"]})),
        rf"{LAST} holds layer.bias.step, as does {FIRST}",
    ),
    "rows of a scalar": (
        rewritten(FIRST, lambda tensors, notes: notes.update({"layer.bias.step": [0, 1]})),
        rf"{FIRST} says \[0, 1\] of layer.bias.step",
    ),
    "a note that is none": (
        rewritten(SECOND, lambda tensors, notes: notes.update({MOMENTUM: [-3, 7]})),
        rf"{SECOND} says \[-3, 7\] of {MOMENTUM}; expected \[first row, rows of the whole\]",
    ),
    "a note of three numbers": (
        rewritten(SECOND, lambda tensors, notes: notes.update({MOMENTUM: [3, 7, 7]})),
        rf"{SECOND} says \[3, 7, 7\] of {MOMENTUM}",
    ),
    "a note that is no list": (
        rewritten(SECOND, lambda tensors, notes: notes.update({MOMENTUM: {"first": 3}})),
        rf"{SECOND} says .'first': 3. of {MOMENTUM}",
    ),
    "notes that are no JSON": (
        lambda d: save_file(load_file(d / SECOND), d / SECOND, metadata={"rows": "["}),
        rf"{SECOND} does not say which rows it holds",
    ),
    "notes that are a list": (
        lambda d: save_file(load_file(d / SECOND), d / SECOND, metadata={"rows": "[1]"}),
        rf"{SECOND} does not say which rows it holds",
    ),
    "notes nested beyond recursion": (
        lambda d: save_file(load_file(d / SECOND), d / SECOND, metadata={"rows": "[" * 10**6}),
        rf"{SECOND} does not say which rows it holds",
    ),
    "rows beyond all numbers": (
        rewritten(SECOND, lambda tensors, notes: notes.update({MOMENTUM: [3, 10**30]})),
        rf"{SECOND} says \[3, 10+\] of {MOMENTUM}",
    ),
    "a hostile header": (lambda d: (d / SECOND).write_bytes((2**62).to_bytes(8, "little") + b"{}"), rf"{SECOND} is no"),
    "a file of nothing": (lambda d: (d / SECOND).write_bytes(b""), rf"{SECOND} is no safetensors file"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_files_that_are_not_the_parts_of_one_state_are_refused_by_name(tmp_path, what):
    damage, message = DAMAGE[what]

    def write(directory: Path) -> None:
        in_parts(directory, STATE, 3)
        damage(directory)

    write(tmp_path)
    with pytest.raises(LayoutError, match=message) as refusal:
        read_layout(tmp_path)
    assert "\n" not in str(refusal.value)
    # A manifest that agrees with the files does not help.
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(1, write, state={})
    (problem,) = store.verify(path)
    assert part_name(0, 3)[:10] in problem


def test_a_checkpoint_of_sound_parts_is_sound(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.verify(store.save(1, lambda directory: in_parts(directory, STATE, 3), state={})) == []


def test_a_state_that_is_not_there_is_refused_by_name(tmp_path):
    with (
        pytest.raises(ValueError, match=r"optimizer.safetensors is missing, and there are no parts of it"),
        stored_state(tmp_path, framework="np", join=np.concatenate),
    ):
        pass
