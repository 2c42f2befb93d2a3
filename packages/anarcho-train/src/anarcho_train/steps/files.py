"""Names of the files that every framework's step writes besides the model's own, so that one reads what another wrote."""

from anarcho_train.optimizer_layout import OPTIMIZER_FILE

__all__ = ["OPTIMIZER_FILE", "RUNTIME_FILE"]

RUNTIME_FILE = "runtime.safetensors"
"""Random generators, each under its framework's name (``rng.cpu``, ``rng.cuda``, ``rng.mps``, ``rng.mlx``), and the loss scale."""
