"""Losses of the training stages, one module per framework."""
