"""Text to token ids to packed batches, with SentencePiece and NumPy alone."""
