"""The processes of a build: one, or those that `mpiexec -n N` starts. They share files and a barrier, nothing else."""
import os
from collections.abc import Sequence
from typing import Any, TypeVar

Task = TypeVar("Task")
STARTED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")  # set by Open MPI, MPICH and Intel MPI


class Ranks:
    """This process's `rank` of `size`."""

    def __init__(self) -> None:
        self.rank, self.size, self._world = 0, 1, None
        if any(name in os.environ for name in STARTED_BY_MPI):
            self._world = _world()
            self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def own(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """The tasks of this rank: every `size`-th."""
        return tasks[self.rank :: self.size]

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self._world is not None:
            self._world.Barrier()

    def end_all(self, status: int) -> None:
        """Ends the processes of all ranks after an error on this one: they would wait at the next barrier for ever."""
        if self._world is not None and self.size > 1:
            self._world.Abort(status)


def _world() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(f"started by MPI, but mpi4py cannot be imported ({error}): pip install mpi4py") from None
    return MPI.COMM_WORLD
