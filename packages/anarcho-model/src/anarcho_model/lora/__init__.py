"""Low-rank adapters: a model is tuned by a small addition to its frozen matrices."""
