"""One GPT with the Hugging Face directory format.

This module and `config`, `directory`, `flops`, `footprint`, `generate.sampling` and `lora.config` are free of any
framework; `anarcho_model.torch`, `anarcho_model.weights` and `anarcho_model.generate.torch` need PyTorch, and
`anarcho_model.mlx`, `anarcho_model.weights_mlx` and `anarcho_model.generate.mlx` MLX.
"""

from anarcho_model.config import ConfigError, InitConfig, ModelConfig, RopeScaling
from anarcho_model.lora.config import LoraConfig

__all__ = ["ConfigError", "InitConfig", "LoraConfig", "ModelConfig", "RopeScaling"]
