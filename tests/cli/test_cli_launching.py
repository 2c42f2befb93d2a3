"""How a process knows that mlx.launch or torchrun has started it with others, and what is refused before they meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from anarcho_cli.back_ends.torch_processes import (
    ProcessesError,
    processes_by_machine,
    replicas_of,
    smallest_strategy,
)
from anarcho_cli.config import resolve
from anarcho_cli.launcher import Order
from anarcho_cli.launching import LaunchError, connected, is_restarted, transport
from anarcho_train import Alone


@pytest.fixture
def hosts(tmp_path):
    """A file of addresses as mlx.launch writes it, of several processes or of one."""

    def write(count: int) -> str:
        path = tmp_path / f"hosts-{count}.json"
        path.write_text(json.dumps([[f"127.0.0.1:{5000 + n}"] for n in range(count)]) if count > 1 else "\n")
        return str(path)

    return write


def test_the_environment_of_mlx_launch_names_the_transport(hosts):
    assert transport({}) is None
    assert transport({"MLX_RANK": "0", "MLX_HOSTFILE": hosts(2)}) == "ring"
    assert transport({"MLX_RANK": "0", "MLX_HOSTFILE": hosts(1)}) is None, "mlx.launch -n 1"
    assert transport({"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "a:1", "MLX_IBV_DEVICES": "f"}) == "jaccl"
    assert transport({"MLX_RANK": "1", "NCCL_HOST_IP": "a", "MLX_WORLD_SIZE": "2"}) == "nccl"
    assert transport({"OMPI_COMM_WORLD_SIZE": "4"}) == "mpi"
    assert transport({"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_a_file_of_addresses_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"MLX_HOSTFILE is .*missing.json, which cannot be read"):
        transport({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "missing.json")})


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_of_torchrun_is_known_unless_it_names_one_process():
    assert transport(TORCHRUN) == "torchrun"
    assert transport(TORCHRUN | {"WORLD_SIZE": "1"}) is None
    assert transport({"WORLD_SIZE": "2"}) is None, "without an address there is nobody to meet"


def test_processes_that_another_frameworks_launcher_started_are_refused(hosts, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(LaunchError, match=r"over torchrun.*start them with mlx\.launch"),
        connected(resolve(), backend="mlx"),
    ):
        pass
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", hosts(2))
    with (
        pytest.raises(LaunchError, match=r"over ring.*start them with torchrun"),
        connected(resolve(), backend="torch"),
    ):
        pass


def test_a_process_alone_loads_no_mlx_to_find_that_out():
    code = (
        "import sys; from anarcho_cli.config import resolve; from anarcho_cli.launching import connected\n"
        "with connected(resolve(), backend='torch') as ranks: assert ranks.size == 1\n"
        "assert not {'mlx', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": ""})


def test_alone_says_its_own_numbers():
    assert Alone().gathered([1.0, 2.0]).tolist() == [[1.0, 2.0]]


def test_launch_is_torchrun_for_one_machine_with_the_command_as_it_stands():
    order = Order(processes=4, max_restarts=2, command=("pretrain", "--name", "run", "--set", "optim.lr=0.1"))
    assert order.here() == [
        *("--standalone", "--nproc-per-node", "4", "--max-restarts", "2", "-m", "anarcho_cli"),
        *("pretrain", "--name", "run", "--set", "optim.lr=0.1"),
    ]
    assert order.elsewhere().startswith("torchrun --nnodes MACHINES --rdzv-backend c10d")
    assert order.elsewhere().endswith("-m anarcho_cli pretrain --name run --set optim.lr=0.1")


def test_the_document_on_scaling_shows_the_line_that_is_printed():
    command = ["pretrain", "--device", "cuda", "--name", "run", "..."]
    line = Order(processes=4, max_restarts=0, command=command).elsewhere()
    assert f"`{line}`" in (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text("utf-8")


def test_what_launch_cannot_start_is_refused_before_torch_is_loaded():
    with pytest.raises(LaunchError, match="expected a command that trains after `--`"):
        Order(processes=2, max_restarts=0, command=("generate", "runs/run"))
    with pytest.raises(LaunchError, match="give the command --name NAME, or --resume RUN"):
        Order(processes=2, max_restarts=1, command=("pretrain",))


def test_only_processes_that_torchrun_starts_again_are_restarted():
    assert not is_restarted(TORCHRUN)
    assert not is_restarted(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"})
    assert is_restarted(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not is_restarted({"TORCHELASTIC_RESTART_COUNT": "1"}), "one process alone begins anew"


class Told:
    """A rank among others of which it is known what they say."""

    def __init__(self, rank, others):
        self.rank, self.size, self._others = rank, len(others), others

    def gathered(self, values):
        assert values[0] == self._others[self.rank]
        return np.array(self._others, np.float64)[:, None]


def test_the_machines_of_processes_are_those_that_torchrun_numbers():
    environment = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    assert processes_by_machine(Told(2, [0, 0, 1, 1]), environment) == [2, 2]
    assert processes_by_machine(Told(3, [0, 0, 0, 1]), environment) == [3, 1]
    assert processes_by_machine(Told(3, [0, 0, 1, 1]), {"LOCAL_WORLD_SIZE": "2"}) == [2, 2]
    assert processes_by_machine(Told(1, [0, 1]), {}) == [1, 1]


def test_the_strategy_is_the_one_that_fits_and_moves_the_least_between_machines():
    for machines in ([4], [4, 4], [4, 2]):
        assert smallest_strategy(100, 100, machines=machines) == "ddp"
        assert smallest_strategy(401, 100, machines=machines) == "fsdp"
    assert smallest_strategy(400, 100, machines=[4, 4]) == "hybrid"
    for machines in ([8], [4, 2], [1, 1]):
        assert smallest_strategy(400, 100, machines=machines) == "fsdp"


def test_replicas_need_as_many_processes_on_each_machine():
    assert replicas_of([2, 2, 2]) == 3
    with pytest.raises(ProcessesError, match=r"hybrid, but the machines have 2, 1 processes; start as many on each"):
        replicas_of([2, 1])
