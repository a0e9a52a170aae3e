"""Which images of a build are duplicates of earlier ones: by equal pixels, or because they look alike.

Two images look alike if at most `NEAR` of the 256 bits of their difference hashes differ (granvit/data/leakage.py; there held-out
images are compared with a wider limit). Images that are mostly plain are compared by their pixels alone.
"""
import numpy as np

from granvit.data.leakage import SIDE, STRUCTURED

NEAR = 7  # of 256 bits
_KEYS = 8  # the bits in 8 numbers of 32: if at most 7 bits differ, one of the numbers is equal
_BUCKET = 64  # images with an equal number that are compared all with all; of more, each with the 63 before it
_BLOCK = 1 << 12  # images that are decided together


def find_duplicates(fingerprints: np.ndarray, exact: np.ndarray, near: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether an image is a duplicate of one that stays. `fingerprints` `[N]` are those of `granvit.data.leakage`;
    `exact` and `near`, bool `[N]`, say by what each image is compared. Of several equal images the first one stays.

    Only images that both take part in a comparison are compared. Measured on one core, memory beside the arguments: of 3 million
    unrelated images 9 s and 90 bytes per image; of 0.5 million, a tenth of them in groups of 200 alike, 7 s and 170 bytes per
    image; all of them in such groups, 75 s and 270 bytes per image.
    """
    duplicate = np.zeros(len(fingerprints), bool)
    taking_part = np.flatnonzero(exact)
    _, first = np.unique(fingerprints["pixels"][taking_part].view("S16"), return_index=True)
    duplicate[taking_part] = True
    duplicate[taking_part[first]] = False
    del taking_part, first
    alike = np.flatnonzero(near & ~duplicate & (fingerprints["state"] == STRUCTURED))
    words_N8 = fingerprints["bits"][alike].view("<u4").reshape(-1, SIDE // 2)
    compared = np.flatnonzero(_shares_number(words_N8))
    alike, words_N8 = alike[compared], words_N8[compared]
    duplicate[alike[_looks_like_earlier(words_N8)]] = True
    return duplicate


def _shares_number(words_N8: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether another row has an equal number at the same place. Of unrelated images few do."""
    shares = np.zeros(len(words_N8), bool)
    for number in range(_KEYS):
        order = np.argsort(words_N8[:, number])
        keys = words_N8[order, number]
        equal = keys[1:] == keys[:-1]
        shares[order[1:][equal]] = True
        shares[order[:-1][equal]] = True
    return shares


def _looks_like_earlier(words_N8: np.ndarray) -> np.ndarray:
    """bool `[N]`: whether a row looks like an earlier one that stays, which is one that looks like none before it."""
    orders = [np.argsort(words_N8[:, number], kind="stable").astype(np.int32) for number in range(_KEYS)]
    places = [np.empty(len(words_N8), np.int32) for _ in range(_KEYS)]
    for order, place in zip(orders, places, strict=True):
        place[order] = np.arange(len(order), dtype=np.int32)
    duplicate = np.zeros(len(words_N8), bool)
    for start in range(0, len(words_N8), _BLOCK):
        undecided = [np.zeros((0, 2), np.int64)]  # (later, earlier) of this block
        for number, (order, place) in enumerate(zip(orders, places, strict=True)):
            later = np.flatnonzero(~duplicate[start : start + _BLOCK]) + start
            for distance in range(1, _BUCKET):
                later = later[place[later] >= distance]
                earlier = order[place[later] - distance]
                equal = words_N8[later, number] == words_N8[earlier, number]
                later, earlier = later[equal], earlier[equal]
                if not len(later):
                    break
                stays = ~duplicate[earlier]  # as far as is known
                close = stays.copy()
                close[stays] = _set_bits(words_N8[later[stays]] ^ words_N8[earlier[stays]]) <= NEAR
                decided = close & (earlier < start)
                duplicate[later[decided]] = True
                open_ = close & ~decided
                undecided.append(np.stack([later[open_], earlier[open_]], 1))
                later = later[~decided]
        _decide(np.concatenate(undecided), duplicate)
    return duplicate


def _decide(pairs_P2: np.ndarray, duplicate: np.ndarray) -> None:
    """Marks in `duplicate` each later one of `(later, earlier)` pairs of which an earlier one stays."""
    pairs_P2 = pairs_P2[np.lexsort((pairs_P2[:, 1], pairs_P2[:, 0]))]
    later, starts = np.unique(pairs_P2[:, 0], return_index=True)
    for one, earlier in zip(later.tolist(), np.split(pairs_P2[:, 1], starts)[1:], strict=True):
        if not duplicate[earlier].all():  # of earlier ones it is decided
            duplicate[one] = True


def _set_bits(words_P8: np.ndarray) -> np.ndarray:
    """The number of set bits in each row of uint32."""
    return np.unpackbits(words_P8.view(np.uint8), axis=1).sum(1)
