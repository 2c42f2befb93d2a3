"""One GPT with the Hugging Face directory format, for PyTorch and MLX."""
