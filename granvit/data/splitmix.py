"""Counter-based random numbers: the SplitMix64 generator (Steele, Lea, Flood: Fast splittable pseudorandom number generators)."""
import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(counters: np.ndarray, *key: int) -> np.ndarray:
    """uint64 hash of each counter under a key: output number `counter` of the SplitMix64 generator seeded by the key.

    Under one key, different counters (below 2^64) have different hashes.
    """
    state = 0
    for part in key:
        state = int(_finish(np.array([(state ^ part) & (2**64 - 1)], np.uint64))[0])
    with np.errstate(over="ignore"):
        return _finish(np.uint64(state) + counters.astype(np.uint64) * np.uint64(_GOLDEN))


def _finish(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = z + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
