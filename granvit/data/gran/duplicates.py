"""Which images of a build are duplicates of earlier ones: by equal pixels, or because they look alike.

Two images look alike if at most `NEAR` of the 256 bits of their difference hashes differ (granvit/data/leakage.py; there held-out
images are compared with a wider limit). Images that are mostly plain are compared by their pixels alone.
"""
import numpy as np

from granvit.data.leakage import SIDE, STRUCTURED

NEAR = 7  # of 256 bits
_KEYS = 8  # the bits in 8 numbers of 32: if at most 7 bits differ, one of the numbers is equal
_BUCKET = 64  # images with an equal number that are compared all with all; of more, each with the 64 before it


def find_duplicates(fingerprints: np.ndarray, exact: np.ndarray, near: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether an image is a duplicate of one that stays. `fingerprints` `[N]` are those of `granvit.data.leakage`;
    `exact` and `near`, bool `[N]`, say by what each image is compared. Of several equal images the first one stays.

    Only images that both take part in a comparison are compared. Memory: about 40 bytes per image.
    """
    count = len(fingerprints)
    duplicate = np.zeros(count, bool)
    taking_part = np.flatnonzero(exact)
    _, first = np.unique(fingerprints["pixels"][taking_part].view("S16"), return_index=True)
    duplicate[taking_part] = True
    duplicate[taking_part[first]] = False
    alike = np.flatnonzero(near & ~duplicate & (fingerprints["state"] == STRUCTURED))
    for later, earlier in _pairs(fingerprints["bits"][alike]):
        if not duplicate[alike[earlier]]:
            duplicate[alike[later]] = True
    return duplicate


def _pairs(bits_N16: np.ndarray) -> list[tuple[int, int]]:
    """All `(later, earlier)` of which at most `NEAR` bits differ, in ascending order."""
    words_N8 = np.ascontiguousarray(bits_N16).view("<u4").reshape(-1, SIDE // 2)
    found: set[tuple[int, int]] = set()
    for number in range(_KEYS):
        order = np.argsort(words_N8[:, number], kind="stable")
        keys = words_N8[order, number]
        for distance in range(1, min(_BUCKET, len(order))):
            equal = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(equal):
                break
            earlier, later = order[equal], order[equal + distance]
            close = _set_bits(words_N8[earlier] ^ words_N8[later]) <= NEAR
            found.update(zip(later[close].tolist(), earlier[close].tolist(), strict=True))
    return sorted(found)


def _set_bits(words_P8: np.ndarray) -> np.ndarray:
    """The number of set bits in each row of uint32."""
    return np.unpackbits(words_P8.view(np.uint8), axis=1).sum(1)
