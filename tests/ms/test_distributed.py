"""What joining a process group does to the process that joins."""
import os
import subprocess
import sys

import pytest

pytest.importorskip("mindspore")

SCRIPT = """
import os, threading
import granvit
from ms_granvit.distributed import _more_than_one_core

core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
done = threading.Event()
with _more_than_one_core():
    assert len(os.sched_getaffinity(0)) > 1
    thread = threading.Thread(target=done.wait)
    thread.start()
assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == {core}
done.set()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is all there is")
def test_a_rank_on_one_core_is_lent_more_and_it_and_its_new_threads_are_bound_again():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
