"""Implementations of `anarcho_train.step.Step`, one module per framework."""
