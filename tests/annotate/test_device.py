"""Devices and cores of a machine, shared out by what mpiexec writes into the environment."""
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
import torch
from transformers import AutoModelForObjectDetection

from granvit.data.annotate import model_directory
from granvit.data.annotate.device import own_device, share_cores
from tests.annotate.tiny_detectors import write_detector

NAMES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


@pytest.fixture
def machine(monkeypatch):
    """Sets environment variables, on a machine with four devices of one kind and none of another. Torch's threads are noted."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(device_count=lambda: 4), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 24)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def environment(**values: str) -> list[int]:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return threads

    return environment


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("number, expected", [("0", "npu:0"), ("3", "npu:3"), ("4", "npu:0"), ("13", "npu:1")])
def test_processes_of_a_machine_take_its_devices_in_turn(machine, name, number, expected):
    machine(**{name: number})
    assert own_device("npu") == expected
    assert [own_device(other) for other in ("cpu", "npu:2", "cuda:1")] == ["cpu", "npu:2", "cuda:1"]


def test_a_process_that_mpi_did_not_start_has_the_device_that_is_named(machine):
    assert [own_device(kind) for kind in ("npu", "cuda", "nonsense")] == ["npu", "cuda", "nonsense"]


@pytest.mark.parametrize("kind", ["cuda", "nonsense"])
def test_devices_that_are_not_there_are_named(machine, kind):
    machine(MPI_LOCALRANKID="1")
    with pytest.raises(ValueError, match=rf"device {kind}: "):
        own_device(kind)


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("ranks, expected", [("8", 4), ("5", 6), ("1", 24), ("64", 1)])  # 24: as torch has it
def test_processes_of_a_machine_share_its_cores(machine, name, ranks, expected):
    threads = machine(**{name: ranks})
    share_cores()
    assert threads == [expected]


def test_a_process_that_mpi_did_not_start_has_all_cores(machine):
    share_cores()
    assert machine() == []


def test_models_are_loaded_to_the_own_device(machine, tmp_path, monkeypatch):
    threads = machine(MPI_LOCALRANKID="6", MPI_LOCALNRANKS="8")
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: moved.append(place) or self)
    model_directory.loaded_model(AutoModelForObjectDetection, write_detector(tmp_path), "npu", "float32")
    assert moved == ["npu:2"] and threads == [4]
