"""Metrics, memory, throughput, progress and early stopping for training runs."""
