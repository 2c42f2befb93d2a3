"""Continuous batching: requests that join and leave while others are being generated; one module per framework."""
