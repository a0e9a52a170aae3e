"""The search for duplicates, against one that compares all images with all."""
import tracemalloc

import numpy as np
import pytest

from granvit.data.gran import duplicates
from granvit.data.gran.duplicates import NEAR, find_duplicates
from granvit.data.leakage import FINGERPRINT, FLAT, STRUCTURED


def _prints(rng: np.random.Generator, sizes: list[int], flips: int) -> np.ndarray:
    """Fingerprints in random order: groups of these sizes, whose bits differ in at most `flips` from a common origin, mostly; a
    tenth has the pixels of another image, a tenth no structure."""
    count = sum(sizes)
    bits = np.repeat(rng.integers(0, 256, (len(sizes), 32), np.uint8), sizes, axis=0)
    for row in bits:
        for bit in rng.integers(0, 256, rng.integers(0, flips + 1)):
            row[bit // 8] ^= 1 << (bit % 8)
    found = np.zeros(count, FINGERPRINT)
    found["bits"] = bits.view("<u2")
    found["pixels"] = rng.integers(0, 256, (count, 16), np.uint8).view("V16")[:, 0]
    found["state"] = np.where(rng.random(count) < 0.1, FLAT, STRUCTURED)
    copies = rng.random(count) < 0.1
    found["pixels"][copies] = found["pixels"][rng.integers(0, count, copies.sum())]
    return rng.permutation(found)


def _expected(prints: np.ndarray, exact: np.ndarray, near: np.ndarray) -> np.ndarray:
    seen: set[bytes] = set()
    duplicate = np.zeros(len(prints), bool)
    for number, pixels in enumerate(prints["pixels"]):
        if exact[number]:
            duplicate[number] = pixels.tobytes() in seen
            seen.add(pixels.tobytes())
    bits = np.unpackbits(np.ascontiguousarray(prints["bits"]).view(np.uint8), axis=1)
    stays = [number for number in range(len(prints)) if near[number] and not duplicate[number]]
    stays = [number for number in stays if prints["state"][number] == STRUCTURED]
    kept: list[int] = []
    for number in stays:
        if kept and ((bits[kept] != bits[number]).sum(1) <= NEAR).any():
            duplicate[number] = True
        else:
            kept.append(number)
    return duplicate


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 14])
@pytest.mark.parametrize("flips", [0, 3, 5])
def test_duplicates_are_those_of_comparing_all_with_all(monkeypatch, block, flips):
    """At 5 flips many images of a group differ in 6 to 10 bits: what stays depends on the order, and chains are long."""
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    rng = np.random.default_rng(flips)
    prints = _prints(rng, [1] * 150 + [2] * 20 + [5] * 10 + [40] * 2, flips)
    exact, near = rng.random(len(prints)) < 0.8, rng.random(len(prints)) < 0.8
    found = find_duplicates(prints, exact, near)
    assert (found == _expected(prints, exact, near)).all() and 60 < found.sum() < 200


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_unrelated_images_are_no_duplicates(count):
    rng = np.random.default_rng(count)
    prints = np.zeros(count, FINGERPRINT)
    prints["bits"] = rng.integers(0, 256, (count, 32), np.uint8).view("<u2")
    prints["pixels"] = rng.integers(0, 256, (count, 16), np.uint8).view("V16")[:, 0]
    prints["state"] = STRUCTURED
    assert not find_duplicates(prints, np.ones(count, bool), np.ones(count, bool)).any()


def test_memory_does_not_grow_with_the_pairs():
    """Of a group of 1,000, 60,000 pairs are compared under each number; in a set they would take 9 MB."""
    rng = np.random.default_rng(0)
    prints = _prints(rng, [1000], 3)
    prints["state"] = STRUCTURED
    everything = np.ones(len(prints), bool)
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_BLOCK", 100)
        found = find_duplicates(prints, ~everything, everything)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.sum() > 800 and peak < 4_000_000
