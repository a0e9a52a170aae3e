"""Which devices and cores the runs of a grid get."""
import pytest

from granvit.ablation import machine
from granvit.ablation.machine import GPU, NPU, this_machine


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    """A machine of eight cores whose environment does not choose devices."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)))
    for variable, _ in (NPU, GPU):
        monkeypatch.delenv(variable, raising=False)


def drivers(folder, **kinds):
    """Device files: `davinci=4` makes davinci0 to davinci3, and the manager's file; a list names numbers."""
    for kind, numbers in kinds.items():
        for number in range(numbers) if isinstance(numbers, int) else numbers:
            (folder / f"{kind}{number}").touch()
    for other in ("davinci_manager", "nvidiactl", "nvidia-uvm"):
        (folder / other).touch()
    return folder


def environments(found, jobs, ranks=1):
    return [slot.environment for slot in found.slots(jobs, ranks)]


def test_runs_are_divided_over_cores(tmp_path):
    for framework in ("mindspore", "torch"):
        found = this_machine(framework, "auto", drivers(tmp_path))
        assert [sorted(slot.cores) for slot in found.slots(found.jobs(2), 2)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert not any(environments(found, 4))
    found = this_machine("torch", "cpu", drivers(tmp_path, nvidia=2))
    assert found.jobs(1) == 8 and found.jobs(3) == 2 and found.jobs(9) == 1
    assert [len(slot.cores) for slot in found.slots(16, 1)] == [1] * 16  # more jobs than cores share them


def test_runs_are_divided_over_devices(tmp_path):
    found = this_machine("mindspore", "auto", drivers(tmp_path, davinci=4))
    assert found.jobs(1) == 4 and found.jobs(2) == 2
    assert environments(found, 2, 2) == [{NPU[0]: "0,1"}, {NPU[0]: "2,3"}]
    assert [sorted(slot.cores) for slot in found.slots(2, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_devices_are_counted_from_0_in_a_container(tmp_path):
    """A container that was given the machine's devices 3 and 5."""
    found = this_machine("torch", "cuda", drivers(tmp_path, nvidia=[3, 5]))
    assert environments(found, 2) == [{GPU[0]: "0"}, {GPU[0]: "1"}]


@pytest.mark.parametrize(
    "shown, expected",
    [("3,5", ("3", "5")), (" 3, 5 ", ("3", "5")), ("GPU-8932f937,MIG-3eb3", ("GPU-8932f937", "MIG-3eb3")), ("1,-1,2", ("1",)),
     ("", ()), ("-1", ()), ("NoDevFiles", ())],
)  # fmt: skip
def test_the_environment_chooses_devices(tmp_path, monkeypatch, shown, expected):
    monkeypatch.setenv(GPU[0], shown)
    found = this_machine("torch", "auto", drivers(tmp_path, nvidia=8))
    assert (found.variable, found.devices) == (GPU[0] if expected else None, expected)
    assert environments(found, 1) == [{GPU[0]: ",".join(expected)} if expected else {}]


def test_the_environment_chooses_npus(tmp_path, monkeypatch):
    monkeypatch.setenv(NPU[0], "6,7")
    for framework, device in (("mindspore", "auto"), ("mindspore", "npu"), ("torch", "npu"), ("torch", "auto")):
        assert environments(this_machine(framework, device, drivers(tmp_path, davinci=8)), 2) == [{NPU[0]: "6"}, {NPU[0]: "7"}]


def test_torch_looks_for_a_gpu_and_then_for_an_npu(tmp_path, monkeypatch):
    folder = drivers(tmp_path, davinci=2)
    assert this_machine("torch", "auto", folder).variable == NPU[0]
    drivers(tmp_path, nvidia=2)
    assert this_machine("torch", "auto", folder).variable == GPU[0]
    monkeypatch.setenv(GPU[0], "")
    assert this_machine("torch", "auto", folder).variable == NPU[0]
    monkeypatch.setenv(NPU[0], "")
    assert this_machine("torch", "auto", folder).variable is None


def test_more_ranks_than_devices_are_refused(tmp_path, monkeypatch):
    found = this_machine("mindspore", "auto", drivers(tmp_path, davinci=4))
    assert found.jobs(8) == 1
    for jobs, ranks, product in ((1, 8, 8), (5, 1, 5), (3, 2, 6)):
        message = f"--jobs {jobs} x --ranks {ranks} = {product} ranks need a device each, and 4 are there .*is not set"
        with pytest.raises(ValueError, match=message):
            found.slots(jobs, ranks)
    monkeypatch.setenv(GPU[0], "")
    with pytest.raises(ValueError, match=r"0 are there \(CUDA_VISIBLE_DEVICES is ''\).*runtime\.device=cpu"):
        this_machine("torch", "cuda", tmp_path).slots(1, 1)
