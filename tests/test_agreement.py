"""Agreement of ranks: texts sent as float sums; an error or a differing fact of one rank stops all. Ranks are threads here."""
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from granvit import preflight
from granvit.agreement import CHUNK, Fact, Refused, agree, broadcast, ranks_where, together
from granvit.checkpoint.pretrained import start_weights
from granvit.checkpoint.run import step_directory
from granvit.checkpoint.run_writer import CheckpointWriter
from granvit.config import language_config, vision_config
from granvit.data.chat import Chat, byte_tokenizer
from granvit.preflight import Loading, agreed_checkpoint, configuration_facts, version_facts, weights_facts
from tests.helpers import run_config
from tests.toy import ToyEngine

VISION, LANGUAGE = vision_config("tiny-vision"), language_config("tiny-language")


class Threads:
    """The sums of several ranks in one process."""

    def __init__(self, world: int):
        self.barrier, self.vectors = threading.Barrier(world, timeout=30), [None] * world

    def rank(self, number: int) -> "ThreadRank":
        return ThreadRank(self, number)


class ThreadRank:
    def __init__(self, threads: Threads, rank: int):
        self.threads, self.rank, self.world, self.device = threads, rank, len(threads.vectors), "cpu"

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        assert values.dtype == np.float32
        self.threads.vectors[self.rank] = values
        self.threads.barrier.wait()
        total = np.sum(self.threads.vectors, 0, np.float32)
        self.threads.barrier.wait()
        return total


def on_ranks(world: int, work) -> list:
    """What `work(ranks)` returns or raises on each rank."""
    threads = Threads(world)

    def guarded(number: int):
        try:
            return work(threads.rank(number))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(guarded, range(world)))


def the_line(results: list) -> str:
    """The one line that every rank was refused with."""
    assert all(isinstance(error, Refused) for error in results), results
    (line,) = {str(error) for error in results}
    assert "\n" not in line
    return line


@pytest.mark.parametrize("length", [0, 1, CHUNK - 8, CHUNK - 7, 3 * CHUNK])
def test_a_text_of_any_length_reaches_every_rank(length):
    text = "é" * (length // 2) + "x" * (length % 2)
    assert on_ranks(3, lambda ranks: broadcast(ranks, text if ranks.rank == 1 else "not said", 1)) == [text] * 3


def test_ranks_where():
    assert on_ranks(4, lambda ranks: ranks_where(ranks, ranks.rank in (1, 3))) == [[1, 3]] * 4


def test_facts_in_which_a_rank_differs_stop_all_with_rank_path_and_both_values():
    def facts(rank: int) -> dict[str, Fact]:
        held = {"version of numpy": Fact("1.26.4"), "store a": Fact("f00d", f"/disk{rank}/a")}
        if rank == 2:
            held |= {"version of numpy": Fact("1.26.3"), "store a": Fact("beef", "/disk2/a")}
        return held

    line = the_line(on_ranks(3, lambda ranks: agree(ranks, facts(ranks.rank))))
    assert line.startswith("rank 2 on ")
    assert "version of numpy 1.26.3 on rank 2, 1.26.4 on rank 0" in line
    assert "store a beef (/disk2/a) on rank 2, f00d (/disk0/a) on rank 0" in line
    assert on_ranks(3, lambda ranks: agree(ranks, facts(0) if ranks.rank != 1 else facts(1))) == [None] * 3


def test_a_fact_that_one_rank_lacks_is_a_difference():
    line = the_line(on_ranks(2, lambda ranks: agree(ranks, {"a": Fact("1")} if ranks.rank else {})))
    assert "a 1 on rank 1, nothing on rank 0" in line


@pytest.mark.parametrize("failing", [(1,), (0,), (1, 2), (0, 1, 2)])
def test_an_error_on_one_rank_is_the_same_line_on_all(failing):
    def work(ranks):
        if ranks.rank in failing:
            raise FileNotFoundError(2, "No such file", f"/disk{ranks.rank}/config.json")
        return ranks.rank

    line = the_line(on_ranks(3, lambda ranks: together(ranks, lambda: work(ranks))))
    assert f"/disk{failing[0]}/config.json" in line
    assert line.startswith(f"rank {failing[0]} on ") or len(failing) == 3
    assert on_ranks(3, lambda ranks: together(ranks, lambda: ranks.rank)) == [0, 1, 2]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run's directory with checkpoints of steps 1 and 2."""
    directory, config = tmp_path_factory.mktemp("begun"), run_config()
    writer = CheckpointWriter(directory, config, VISION, LANGUAGE)
    engine = ToyEngine(config, VISION, LANGUAGE, writer.record_start(start_weights(config, VISION, LANGUAGE)))
    for step in (1, 2):
        writer.save(engine, step, {})
    return directory


def disks(begun, tmp_path, change):
    """The run on two disks; `change` edits the second."""
    for rank in range(2):
        shutil.copytree(begun, tmp_path / str(rank))
    change(tmp_path / "1")
    return on_ranks(2, lambda ranks: agreed_checkpoint(ranks, tmp_path / str(ranks.rank)))


def test_every_rank_opens_the_checkpoint_that_rank_0_chose(begun, tmp_path):
    def newer(run):
        shutil.copytree(step_directory(run, 2), step_directory(run, 3))

    assert [found.step for found in disks(begun, tmp_path, newer)] == [2, 2]
    assert on_ranks(2, lambda ranks: agreed_checkpoint(ranks, begun, wanted=False)) == [None, None]


def test_a_rank_that_does_not_see_the_checkpoint_stops_all(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SEEN_WITHIN", 0.2)
    line = the_line(disks(begun, tmp_path, lambda run: shutil.rmtree(step_directory(run, 2))))
    assert line.startswith("rank 1 on ") and f"{tmp_path}/1/checkpoints/step_0000002 " in line


def test_a_checkpoint_that_appears_late_is_waited_for(begun, tmp_path):
    def late(run):
        hidden = step_directory(run, 2).rename(run / "hidden")
        threading.Timer(0.3, lambda: hidden.rename(step_directory(run, 2))).start()

    assert [found.step for found in disks(begun, tmp_path, late)] == [2, 2]


@pytest.mark.parametrize("file", ["state.json", "optimizer.sha256.json"])
def test_another_checkpoint_of_the_same_step_stops_all(begun, tmp_path, file):
    def change(run):
        path = step_directory(run, 2) / file
        other = step_directory(run, 1) / file
        if file == "state.json":
            shutil.copy(other, path)
        else:
            digests = json.loads(path.read_text())
            path.write_text(json.dumps(dict.fromkeys(digests, "0" * 64)))

    line = the_line(disks(begun, tmp_path, change))
    assert line.startswith("rank 1 on ") and f"{tmp_path}/1/checkpoints/step_0000002/{file}" in line


def test_one_number_of_one_tensor_is_another_hash_of_its_part():
    config, wrong = run_config(), "vision.embeddings.patch_embedding.weight"

    def load(ranks):
        def read():
            for name, array in start_weights(config, VISION, LANGUAGE):
                if ranks.rank == 1 and name == wrong:
                    array = array.copy()
                    array.flat[5] = np.nextafter(array.flat[5], np.float32(9))
                yield name, array

        loading = Loading("weights", 1, hashed=True)
        assert wrong in dict(loading.watch(read()))
        agree(ranks, weights_facts(loading.hashes(), config, LANGUAGE, None))

    line = the_line(on_ranks(2, load))
    assert "weights of vision" in line and "weights of language" not in line and "weights of projector" not in line


def test_every_key_of_configuration_and_models_is_compared():
    config = run_config()
    facts = configuration_facts(config, VISION, LANGUAGE, Path("run.yaml"))
    other = VISION.model_copy(update={"norm_eps": 1e-5})
    changed = configuration_facts(run_config(distill={"alpha": 0.5}), other, LANGUAGE, Path("x"))
    assert [what for what in facts if facts[what].value != changed[what].value] == ["distill.alpha", "model tiny-vision norm_eps"]


def test_versions_and_sources_of_the_framework_in_use_are_compared():
    facts = version_facts("torch")
    assert {"version of granvit", "version of numpy", "version of torch", "source code"} <= facts.keys()
    assert "version of mindspore" not in facts


def test_the_tokenizers_contents_not_the_librarys_version(monkeypatch):
    chat, other = Chat(byte_tokenizer("qwen2.5"), "qwen2.5"), byte_tokenizer("qwen2.5")
    other.add_tokens(["word"])
    before = chat.contents_fingerprint, chat.fingerprint
    assert Chat(other, "qwen2.5").contents_fingerprint != before[0]
    monkeypatch.setattr("granvit.data.chat.tokenizers.__version__", "0")
    assert chat.contents_fingerprint == before[0] and chat.fingerprint != before[1]
