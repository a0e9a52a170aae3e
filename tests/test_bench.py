"""The benchmarks' own logic: the formula of `packing`, index and ranks of `order --scale paper`, how `build` reads memory."""
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import bench
import bench_build
import bench_order

from granvit.cost import attention_macs, language_macs, projector_macs, vision_macs
from granvit.data.store import Store
from granvit.plan import SOURCES

SCALE = 20_000


def test_a_frozen_decoder_costs_two_passes_and_its_attention_three():
    size, rows, regions = bench.DEMO, 5, 6
    length, answers = bench.PREFIX + size.vision.patches + regions * (bench.QUESTION + bench.ANSWER), regions * bench.ANSWER
    decoder = 2 * language_macs(size.language, length, answers) + attention_macs(size.language, length)
    row = 3 * vision_macs(size.vision) + 3 * projector_macs(size.vision, size.language) + decoder
    assert bench.train_macs(size, regions, rows, False) == pytest.approx(rows * row)
    teacher = regions * vision_macs(size.vision, size.crop)
    assert bench.train_macs(size, regions, rows, True) == pytest.approx(rows * (row + teacher))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("stores") / name for name in ("natural", "ocr")]
    for folder, source, natural in zip(folders, SOURCES, (True, False), strict=True):
        bench_order.write_index(folder, *source, natural, SCALE)
    return folders


def test_the_index_opens_as_a_store_in_the_papers_proportions(stores):
    for folder, (images, regions), has_captions in zip(stores, SOURCES, (True, False), strict=True):
        store = Store(folder)
        assert store.records == images // SCALE and store.globals == store.records * has_captions
        assert store.regions == pytest.approx(regions / SCALE, rel=0.25)


@pytest.mark.parametrize("counted", [False, True])
def test_a_resumed_rank_and_its_reader_have_the_rows_of_one_that_started(stores, counted, tmp_path):
    started = bench_order._with_lengths(bench_order._rank, stores, counted, None)
    resumed = bench_order._with_lengths(bench_order._rank, stores, counted, started.at)
    bench_order._with_lengths(bench_order._send, stores, counted, tmp_path / "plan")
    reader = bench_order._with_lengths(bench_order._reader, tmp_path / "plan", started.at)
    assert started.rows == resumed.rows == reader.rows
    other = bench_order._with_lengths(bench_order._rank, stores, counted, started.at - 1)
    assert other.rows != started.rows
    natural, ocr = (Store(folder) for folder in stores)
    questions = natural.globals + natural.regions + 0.492 * ocr.regions
    assert started.steps == pytest.approx(questions / 256, rel=0.05)


def test_memory_is_read_while_a_process_runs():
    program = "import time; held = b'x' * 60_000_000; del held; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        made.stdout.readline()
        found = bench_build.memory_of(made.pid)
        made.kill()
        made.wait()
    assert found is not None and found.highest > found.now + 50_000_000
    assert bench_build.memory_of(made.pid) is None
