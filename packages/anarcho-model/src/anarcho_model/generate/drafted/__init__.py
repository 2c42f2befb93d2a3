"""Texts whose tokens are guessed before they are drawn; one module per framework."""
