"""The processes of a build: one, or those that `mpiexec -n N` starts. They share files; MPI carries barriers and messages."""
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
STARTED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")  # set by Open MPI, MPICH and Intel MPI
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_OTHER_MPI = "mpi4py uses another MPI; start with mpiexec of the package mpich, which is beside `python`"
_TAKEN = ".taken-"
_POLL = 0.02  # seconds


class Ranks:
    """This process's `rank` of `size`."""

    def __init__(self) -> None:
        self.rank, self.size, self._world = 0, 1, None
        if any(name in os.environ for name in STARTED_BY_MPI):
            self._world = _world()
            self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
            stated = {os.environ[name] for name in _SIZES if name in os.environ}
            if stated and str(self.size) not in stated:
                raise ValueError(f"mpiexec started {' or '.join(stated)} processes, but there are {self.size}; {_OTHER_MPI}")

    def share(self, tasks: Sequence[Task], folder: Path) -> Iterator[Task]:
        """Yields the tasks that this rank has to do, and ends when all ranks have done theirs. All ranks pass the same tasks.

        A rank takes the next task that no other rank has taken: tasks differ in length, and so do machines. It takes a task by
        making a file in a folder of this run in `folder`, which all ranks see; that works on file systems without locks too.
        """
        if self._world is None:
            yield from tasks
            return
        taken = folder / f"{_TAKEN}{self._world.bcast(uuid.uuid4().hex if self.rank == 0 else None)}"
        taken.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for left in folder.glob(f"{_TAKEN}*"):  # by runs that were killed
                if left != taken:
                    shutil.rmtree(left)
        for number, task in enumerate(tasks):
            try:
                os.close(os.open(taken / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            yield task
        self.barrier()
        if self.rank == 0:
            shutil.rmtree(taken)

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` returns on rank 0, on all ranks: for what is computed once. It must be picklable."""
        if self._world is None:
            return make()
        made = make() if self.rank == 0 else None
        self.barrier()  # the broadcast alone would keep the cores of the others busy
        return self._world.bcast(made)

    def barrier(self) -> None:
        """Waits until all ranks are here. Unlike MPI's own, it leaves the core to others: a rank can wait for hours."""
        if self._world is not None:
            arrived = self._world.Ibarrier()
            while not arrived.Test():
                time.sleep(_POLL)

    def end_all(self, status: int) -> None:
        """Ends the processes of all ranks after an error on this one: they would wait at the next barrier for ever."""
        if self._world is not None and self.size > 1:
            self._world.Abort(status)


def _world() -> Any:
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except Exception as error:  # RuntimeError: mpi4py without an MPI library
        raise ValueError(f"started by MPI, but mpi4py cannot be used ({error}): pip install -e '.[build]'") from None
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "Open MPI" not in MPI.Get_library_version():  # MPICH would abort
        raise ValueError(f"started by Open MPI; {_OTHER_MPI}")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    return MPI.COMM_WORLD
