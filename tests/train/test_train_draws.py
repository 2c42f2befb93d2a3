"""Random numbers of a step follow from seed, step and row: not from the split into micro-batches, and not from what came before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anarcho_train import CheckpointStore, StepSchedule, TrainConfig, TrainingDraws
from anarcho_train.steps.torch import TorchStep

from .conftest import Bigram, CountingText


def rows(count: int = 6, length: int = 12, **arrays: np.ndarray) -> Any:
    plain = {"tokens": np.zeros((count, length), np.int32), "weights": np.ones((count, length), np.float32)}
    return SimpleNamespace(**{**plain, "segments": None, **arrays})


def part(batch: Any, first: int, stop: int) -> Any:
    return SimpleNamespace(
        **{name: None if array is None else array[first:stop] for name, array in vars(batch).items()}
    )


DRAWS = TrainingDraws(seed=3, dim=8, neftune_alpha=5.0, dropout=True)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_any_split_draws_the_same_for_a_row(micro):
    batch = rows()
    whole = DRAWS(batch, step=4, first_row=0)
    parts = [DRAWS(part(batch, first, first + micro), step=4, first_row=first) for first in range(0, 6, micro)]
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([draws[name] for draws in parts]))


def test_rows_steps_and_seeds_draw_differently():
    batch = rows(2)
    one = DRAWS(batch, step=0, first_row=0)
    others = [
        DRAWS(batch, step=1, first_row=0),
        DRAWS(batch, step=0, first_row=2),
        TrainingDraws(seed=4, dim=8, neftune_alpha=5.0, dropout=True)(batch, step=0, first_row=0),
    ]
    for other in others:
        assert not np.isclose(one["embedding_noise"], other["embedding_noise"]).any()
        assert not (one["dropout_keys"] == other["dropout_keys"]).any()
    assert not np.isclose(*one["embedding_noise"]).any()


def test_noise_is_uniform_up_to_alpha_over_the_root_of_the_segments_length_times_the_width():
    segments = np.array([[0] * 4 + [1] * 7 + [2]])
    noise = TrainingDraws(seed=0, dim=2000, neftune_alpha=5.0)(rows(1, segments=segments), step=0, first_row=0)
    (scaled,) = noise["embedding_noise"]
    for segment, length in enumerate((4, 7, 1)):
        unit = scaled[segments[0] == segment] / (5 / np.sqrt(length * 2000))
        assert 0.99 < np.abs(unit).max() <= 1.0001
        assert np.abs(unit.mean()) < 0.05
        assert unit.var() == pytest.approx(1 / 3, abs=0.03)


def test_a_row_without_segments_ends_with_its_last_target_that_counts():
    weights = np.array([[0, 0, 1, 1, 0, 0, 0, 0], [1] * 8], np.float32)
    noise = TrainingDraws(seed=0, dim=4000, neftune_alpha=1.0)(rows(2, 8, weights=weights), step=0, first_row=0)
    largest = np.abs(noise["embedding_noise"]).max(axis=(1, 2))
    assert largest == pytest.approx(1 / np.sqrt(np.array([4, 8]) * 4000), rel=1e-2)


def test_neutral_draws_have_the_shapes_and_change_nothing():
    neutral, drawn = DRAWS.neutral(rows()), DRAWS(rows(), step=0, first_row=0)
    assert {name: array.shape for name, array in neutral.items()} == {name: a.shape for name, a in drawn.items()}
    assert not neutral["embedding_noise"].any()
    assert (neutral["dropout_keys"] < 0).all()


class NoisyBigram(Bigram):
    """Adds the noise to its embeddings, and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def token_logprobs(self, tokens, targets, *, embedding_noise=None, **_):
        self.given.append(embedding_noise)
        embedded = self.embedding(tokens) if embedding_noise is None else self.embedding(tokens) + embedding_noise
        return self.head(self.hidden(embedded).tanh()).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def noisy_step() -> TorchStep:
    torch.manual_seed(0)
    model = NoisyBigram()
    return TorchStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        config=TrainConfig(precision="float32", compile="off", batch_tokens=32, grad_clip=0.0),
        save_model=lambda m, directory: None,
        load_model=lambda m, directory: None,
        draws=TrainingDraws(seed=1, dim=8, neftune_alpha=5.0),
    )


def test_a_step_learns_with_noise_the_same_in_every_split_and_evaluates_without():
    text = CountingText()
    norms = []
    for micro in (8, 2):
        step = noisy_step()
        batches = [text.rows(range(first, first + micro)) for first in range(0, 8, micro)]
        norms.append(step.train(batches, schedule=StepSchedule(lr_scale=1.0, number=5)).grad_norm)
        other = noisy_step().train(batches, schedule=StepSchedule(lr_scale=1.0, number=6)).grad_norm
        assert other != pytest.approx(norms[-1], rel=1e-4)
        step.evaluate(batches[0])
        assert [noise is None for noise in step.model.given] == [False] * (8 // micro) + [True]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_files_in_folders_are_part_of_a_checkpoint(tmp_path: Path):
    store = CheckpointStore(tmp_path)

    def write(directory: Path) -> None:
        (directory / "adapter").mkdir()
        (directory / "adapter" / "weights").write_text("abc")

    saved = store.save(1, write, state={})
    assert store.verify(saved) == []
    (saved / "adapter" / "weights").write_text("abd")
    assert "adapter/weights has another SHA-256" in store.verify(saved)[0]
    (saved / "adapter" / "weights").unlink()
    assert "adapter/weights is missing" in store.verify(saved)[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_text("abc")
    (saved / "adapter").rmdir()
    (saved / "adapter").symlink_to(tmp_path / "elsewhere")
    assert "no regular file" in store.verify(saved)[0]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.1, 1), (3.0, 8), (0.4, 1), (1.2, 3)])
def test_epochs_are_as_many_steps_as_see_every_sample_so_often(epochs, steps):
    assert TrainConfig(epochs=epochs).steps_of_epochs(samples_per_epoch=10, samples_per_step=4) == steps


def test_without_epochs_the_steps_are_those_of_the_configuration():
    assert TrainConfig(steps=7).steps_of_epochs(samples_per_epoch=10, samples_per_step=4) == 7
    assert TrainConfig(epochs=0.1).steps_of_epochs(samples_per_epoch=30, samples_per_step=1) == 3
    with pytest.raises(ValueError, match=r"train.epochs is 0; expected a positive number"):
        TrainConfig(epochs=0)
    with pytest.raises(ValueError, match=r"train.neftune_alpha is -1"):
        TrainConfig(neftune_alpha=-1)
