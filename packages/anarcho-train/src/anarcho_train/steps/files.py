"""Names of the files that every framework's step writes besides the model's own, so that one reads what another wrote."""

OPTIMIZER_FILE = "optimizer.safetensors"
"""``<parameter>.<state>``, such as ``model.norm.weight.exp_avg``."""

RUNTIME_FILE = "runtime.safetensors"
"""Random generators, each under its framework's name (``rng.cpu``, ``rng.cuda``, ``rng.mps``, ``rng.mlx``), and the loss scale."""
