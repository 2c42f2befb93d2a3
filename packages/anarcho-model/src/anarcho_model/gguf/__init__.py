"""Models in GGUF, the single file of llama.cpp: `gguf.reading` and `gguf.writing`, which need the extra `gguf`.

Nothing here needs a framework: tensors are NumPy arrays with the names of `model.safetensors`. What a file says of its tokenizer is
passed through as plain values, under the keys that the format gives them.
"""
