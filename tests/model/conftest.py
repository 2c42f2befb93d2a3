"""Small models of every variant; annotated shapes are checked in this folder's tests, and not while a model is compiled."""

from __future__ import annotations

import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from anarcho_model import InitConfig, ModelConfig
from anarcho_model.torch import GPT

sys.path.insert(0, str(Path(__file__).parent))  # where pytest's importlib mode does not look for helper modules

torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first

SMALL = {"vocab_size": 67, "context_length": 40, "num_layers": 2, "dim": 32, "num_heads": 4, "hidden_dim": 48}
VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 1},
    "untied": {"tie_embeddings": False, "norm_eps": 1e-6, "rope_theta": 500.0},
    "wide_heads": {"head_dim": 12, "qk_norm": True, "tie_embeddings": False},
}


@pytest.fixture(autouse=True)
def checked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)


@pytest.fixture
def unchecked_shapes(checked_shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(params=VARIANTS, scope="session")
def model(request: pytest.FixtureRequest) -> GPT:
    """A small model of every variant, with no tensor at zero, so that every part of it shows in the output."""
    return make_model(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def small_model() -> GPT:
    """The plain small model."""
    return make_model()


@pytest.fixture(scope="session")
def build():
    """Make a small model with the given options."""
    return make_model


def make_model(**options: object) -> GPT:
    model = GPT(ModelConfig(**{**SMALL, **options}))
    model.init_weights(seed=1, init=InitConfig(embedding_std=0.3, head_std=0.3, zero_residual_outputs=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms away from one, or a forgotten weight would not show
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.2 * noise)
    return model
