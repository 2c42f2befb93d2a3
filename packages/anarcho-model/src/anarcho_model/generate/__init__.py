"""Generating text: framework-free settings in `sampling`, one module per framework beside it."""
