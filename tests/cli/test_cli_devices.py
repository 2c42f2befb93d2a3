"""The choice of a device, with injected machines."""

from __future__ import annotations

import pytest
from anarcho_cli.devices import Accelerators, DeviceError, resolve_backend, resolve_device

NOTHING = Accelerators()
APPLE = Accelerators(mps=True)
CUDA = Accelerators(cuda=("NVIDIA H100",))


def test_auto_takes_the_apple_gpu_without_a_word() -> None:
    resolution = resolve_device("auto", find=lambda: APPLE)
    assert (resolution.device, resolution.note) == ("mps", None)


def test_auto_falls_back_to_the_cpu_and_says_so_in_one_line() -> None:
    resolution = resolve_device("auto", find=lambda: NOTHING)
    assert resolution.device == "cpu"
    assert resolution.note is not None
    assert "\n" not in resolution.note
    assert "cuda" not in resolution.note


def test_auto_never_takes_cuda_but_names_the_flag_that_would() -> None:
    resolution = resolve_device("auto", find=lambda: CUDA)
    assert resolution.device == "cpu"
    assert resolution.note is not None
    assert "--device cuda" in resolution.note
    assert "NVIDIA H100" in resolution.note


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(("wanted", "machine"), [("mps", APPLE), ("cuda", CUDA)])
def test_a_device_asked_for_by_name_is_used(wanted: str, machine: Accelerators, backend: str) -> None:
    assert resolve_device(wanted, backend=backend, find=lambda: machine).device == wanted
    assert resolve_device("gpu", backend=backend, find=lambda: machine).device == wanted


def test_an_mlx_that_is_installed_for_cuda_uses_it_and_says_so() -> None:
    resolution = resolve_device("auto", backend="mlx", find=lambda: CUDA)
    assert resolution.device == "cuda"
    assert resolution.note is not None
    assert "NVIDIA H100" in resolution.note


def test_mlx_without_a_gpu_names_itself_where_it_refuses_one() -> None:
    with pytest.raises(DeviceError, match="--device gpu, but MLX finds no GPU here"):
        resolve_device("gpu", backend="mlx", find=lambda: NOTHING)
    assert resolve_device("auto", backend="mlx", find=lambda: NOTHING).device == "cpu"


def test_the_back_end_is_torch_unless_another_is_named() -> None:
    assert resolve_backend(None, installed=lambda name: True) == "torch"
    assert resolve_backend("mlx", installed=lambda name: True) == "mlx"


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_back_end_that_is_not_installed_is_refused_with_how_to_install_it(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"anarcho-cli\[{name}\]"):
        resolve_backend(name, installed=lambda module: False)


def test_an_unknown_back_end_is_refused_with_those_there_are() -> None:
    with pytest.raises(DeviceError, match=r"'jax'.*torch, mlx"):
        resolve_backend("jax")


def test_the_cpu_is_used_without_looking_for_anything_else() -> None:
    def find() -> Accelerators:
        raise AssertionError("looked")

    assert resolve_device("cpu", find=find).device == "cpu"


@pytest.mark.parametrize(("wanted", "machine"), [("mps", NOTHING), ("mps", CUDA), ("cuda", NOTHING), ("cuda", APPLE)])
def test_a_device_that_is_not_there_is_refused_by_name(wanted: str, machine: Accelerators) -> None:
    with pytest.raises(DeviceError, match=f"--device {wanted}.*use --device cpu, or auto"):
        resolve_device(wanted, find=lambda: machine)
