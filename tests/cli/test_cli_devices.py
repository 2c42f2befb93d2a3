"""The choice of a device, with injected machines."""

from __future__ import annotations

import pytest
from anarcho_cli.devices import Accelerators, DeviceError, resolve_device

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


@pytest.mark.parametrize(("wanted", "machine"), [("mps", APPLE), ("cuda", CUDA)])
def test_a_device_asked_for_by_name_is_used(wanted: str, machine: Accelerators) -> None:
    assert resolve_device(wanted, find=lambda: machine).device == wanted


def test_the_cpu_is_used_without_looking_for_anything_else() -> None:
    def find() -> Accelerators:
        raise AssertionError("looked")

    assert resolve_device("cpu", find=find).device == "cpu"


@pytest.mark.parametrize(("wanted", "machine"), [("mps", NOTHING), ("mps", CUDA), ("cuda", NOTHING), ("cuda", APPLE)])
def test_a_device_that_is_not_there_is_refused_by_name(wanted: str, machine: Accelerators) -> None:
    with pytest.raises(DeviceError, match=f"--device {wanted}.*use --device cpu, or auto"):
        resolve_device(wanted, find=lambda: machine)
