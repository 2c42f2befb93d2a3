"""The anarcho command: raw text to a trained language model."""
