"""The training loop, its stages and its exact checkpoints, for any model."""
