"""Several processes of a build: how they divide work, and how they end together."""
import os
import subprocess
import sys
from collections import Counter

import pytest

from granvit.data.gran.ranks import STARTED_BY_MPI, Ranks
from granvit.launch import RunLock, detect_launch
from tests.gran.mpi import mpiexec
from tests.gran.small_tree import picture

SHARING = """
import pathlib, sys, time
from granvit.data.gran.ranks import Ranks
ranks, folder, told = Ranks(), pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
for turn in range(2):
    for task in ranks.share(range(40), folder):
        time.sleep(0.2 if ranks.rank == 0 and task else 0.001)
        (told / f"turn {turn} task {task} by {ranks.rank} of {ranks.size}").touch()
    assert ranks.from_first(lambda: ranks.rank + turn) == turn
    (told / f"turn {turn} ended with {len(list(told.glob(f'turn {turn} task*')))}, told {ranks.rank}").touch()
"""


def test_each_task_is_done_by_one_rank_whatever_a_killed_run_left(tmp_path):
    folder, told = tmp_path / "out", tmp_path / "told"
    told.mkdir()
    (folder / ".taken-0123").mkdir(parents=True)
    (folder / ".taken-0123" / "7").touch()
    ranks = mpiexec(3, str(folder), str(told), program=SHARING)
    printed = ranks.communicate(timeout=300)[0]
    assert ranks.returncode == 0, printed
    lines = [path.name for path in told.iterdir()]
    tasks = Counter(line.partition(" by ")[0] for line in lines if " by " in line)
    assert tasks == {f"turn {turn} task {task}": 1 for turn in range(2) for task in range(40)}
    assert {f"turn {turn} ended with 40, told {rank}" for turn in range(2) for rank in range(3)} < set(lines)
    assert not list(folder.iterdir())


def test_the_error_of_one_rank_ends_all(tmp_path):
    program = """
import sys
from granvit.data.gran import command
def build(config, out, ranks):
    if ranks.rank == 1:
        raise ValueError("sources.a: it is broken")
    ranks.barrier()
command.build = build
sys.exit(command.main())
"""
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "build.yaml").write_text(
        f"out: {tmp_path}/out\nsources: {{a: {{store: s, images: {tmp_path}, read: {{format: folder, images: {tmp_path}}}}}}}\n"
    )
    ranks = mpiexec(3, "--config", str(tmp_path / "build.yaml"), program=program)
    printed = ranks.communicate(timeout=300)[0]
    assert ranks.returncode == 2, printed
    lines = printed.strip().split("\n")
    assert "rank 1: error: sources.a: it is broken" in lines and len(lines) <= 2, printed  # MPI says that it was told to end


def test_the_second_build_in_a_directory_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "build.yaml").write_text(
        f"out: {tmp_path}/out\nsources: {{a: {{store: s, images: {tmp_path}, read: {{format: folder, images: {tmp_path}}}}}}}\n"
    )
    held = RunLock(tmp_path / "out", detect_launch())
    ranks = mpiexec(2, "--config", str(tmp_path / "build.yaml"))
    printed = ranks.communicate(timeout=300)[0]
    held.release()
    assert ranks.returncode == 2, printed
    assert printed.count("is in use by") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock"]


def test_processes_started_by_mpi_without_mpi4py_are_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert Ranks().size == 1
    for name in STARTED_BY_MPI:
        with monkeypatch.context() as only, pytest.raises(ValueError, match="mpi4py"):
            only.setenv(name, "2")
            Ranks()


def test_the_mpiexec_of_another_mpi_is_named():
    program = "from granvit.data.gran.ranks import Ranks; Ranks()"
    found = subprocess.run([sys.executable, "-c", program], env=os.environ | {"OMPI_COMM_WORLD_SIZE": "2"}, capture_output=True)
    assert b"ValueError: started by Open MPI; mpi4py uses another MPI" in found.stderr
