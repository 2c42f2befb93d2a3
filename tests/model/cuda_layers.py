"""What the tests of layers that are compiled for CUDA share: formulas for their kernels, and a step of a compiled model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from anarcho_model.layers import torch_cuda
from anarcho_model.layers.torch_rotary import rotate
from torch import Tensor
from torch.nn.attention import flex_attention

HALF = torch.bfloat16


def draws(*shape: int, seed: int, dtype: torch.dtype = HALF, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def swiglu_formula(gate_up: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, side by side, and the hidden layer, in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    grad = grad_hidden.double()
    parts = torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
    return torch.cat(parts, dim=-1), F.silu(gate) * up


def rounded_swiglu(gate_up: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the type of ``gate_up``."""
    gradient, hidden = swiglu_formula(gate_up, grad_hidden)
    return gradient.to(gate_up.dtype), hidden.to(gate_up.dtype)


def swiglu_in_place(gate_up: Tensor, hidden: Tensor) -> Tensor:
    """The gradient alone; the hidden layer lies where its own was."""
    gradient, own = rounded_swiglu(gate_up, hidden)
    hidden.copy_(own)
    return gradient


def rotary_formula(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotation is taken back by the one about the opposite angle."""
    parts = [rotate(grad.double(), cos.double(), -sin.double()) for grad in (grad_q, grad_k)] + [grad_v.double()]
    return torch.cat(parts, dim=1).transpose(1, 2).flatten(2).flatten(0, 1).to(grad_q.dtype)


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for CUDA serves the CPU, where FlexAttention would refuse gradients, though it has them as formulas."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch_cuda, "AVAILABLE", True)


def check_interpreted(file: str) -> None:
    """Calls `check_kernels` of a test file in a process of its own, where Triton's interpreter runs the kernels on the CPU."""
    code = f"import runpy; runpy.run_path({file!r})['check_kernels']('cpu')"
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def step(
    model, how: str, *, device: str = "cpu", backend: str = "aot_eager", segments: bool = False, length: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step under autocast, the model compiled whole, without a break, or in parts."""
    model.zero_grad()
    tokens = torch.randint(67, (3, length), generator=torch.Generator().manual_seed(0)).to(device)
    options = {}
    if segments:
        place = torch.arange(length, device=device).expand(3, length)
        second = place >= length // 3
        options = {"segments": second.long(), "positions": torch.where(second, place - length // 3, place)}

    def loss_of() -> Tensor:
        return -model.token_logprobs(tokens, tokens.roll(1, 1), **options).mean()

    if how == "parts":
        model.compile_parts(backend)
    run = torch.compile(loss_of, fullgraph=True, dynamic=False, backend=backend) if how == "whole" else loss_of
    with torch.autocast(device, HALF):
        loss = run()
    loss.backward()
    model.compile_parts(None)
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
