"""The training loop, its stages and its exact checkpoints, for any model."""

from anarcho_train.config import TrainConfig

__all__ = ["TrainConfig"]
