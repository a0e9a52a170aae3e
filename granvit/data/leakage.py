"""Refuses a held-out store that shares images with training.

Two fingerprints of each image are compared:
- equal: the BLAKE2b hash (128 bits) of the size and the decoded pixels;
- nearly equal: a difference hash of 256 bits. The image is reduced to 17 x 16 grey values; each bit says whether a value is
  larger than its left neighbour. Two images are nearly equal if at most `NEAR` bits differ. Scaled, re-encoded, brightened
  and slightly edited copies are found; mirrored, turned and cropped ones are not. (Difference hash: N. Krawetz, "Kind of Like
  That", hackerfactor.com, 2013, there with 9 x 8 values.)

An image whose neighbouring grey values are mostly equal (a blank page, a plain background with one small object) has bits that
say nothing. Such an image is compared by its pixels alone.

Fingerprints are computed once per store, and kept in STORE/fingerprints, or in `~/.cache/granvit` if the store is read-only. That
two stores share no image is kept there too, for the held-out store, under a hash of the fingerprints of both.
"""
import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from granvit.data.images import decode
from granvit.data.shares import make_in_shares
from granvit.data.store import MAX_PIXELS, Store
from granvit.logs import log

SIDE = 16  # the difference hash has SIDE x SIDE bits
NEAR = 31  # of 256 bits; between unrelated scenes of the demo at least 67 differ (200 x 8,000 pairs)
STEP = 2.0  # grey values; smaller differences between neighbours are no structure
STRUCTURE = 0.5  # share of the neighbours that differ by at least STEP in an image that can be compared by its difference hash
NO_IMAGE, FLAT, STRUCTURED, DAMAGED = range(4)
NAMED = 5  # pairs that the error names
_SHARE = 4096  # records per share of the work
FINGERPRINT = np.dtype([("pixels", "V16"), ("bits", "<u2", SIDE), ("state", "u1")])


def difference_hash(image_HW3: np.ndarray) -> tuple[np.ndarray, bool]:
    """The difference hash of a uint8 RGB image, packed into 16 numbers of 16 bits (uint16 `[16]`), and whether the image has
    enough structure to be compared by it."""
    grey = Image.fromarray(image_HW3).convert("F")
    values = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.BOX))
    steps = np.diff(values, axis=1)
    bits = np.packbits(steps > 0).view("<u2")
    return bits, bool((np.abs(steps) >= STEP).mean() >= STRUCTURE)


def fingerprints(store: Store) -> np.ndarray:
    """The fingerprints of all records of a store: a memory-mapped structured array `[records]` with the fields `pixels` (16
    bytes), `bits` (uint16 `[16]`) and `state` (`NO_IMAGE`, `FLAT`, `STRUCTURED` or `DAMAGED`)."""
    shares = list(pairwise([*range(0, store.records, _SHARE), store.records]))
    name = f"fingerprints-{store.fingerprint}-{SIDE}-{STEP:g}-{STRUCTURE:g}.bin"
    for folder in _folders(store):
        path = folder / name
        try:
            if not path.exists():
                what = f"fingerprints of the images of {store.path}, once"
                make_in_shares(path, [b - a for a, b in shares], lambda n: _make(store, *shares[n]), what)
        except PermissionError:
            continue
        except OSError as error:
            if error.errno == errno.EROFS:
                continue
            raise
        found = np.memmap(path, FINGERPRINT, "r")
        if len(found) != store.records:
            raise ValueError(f"{path}: {len(found)} fingerprints of {store.records} records; delete the file")
        return found
    raise ValueError(f"fingerprints of {store.path}: neither {store.path} nor ~/.cache/granvit is writable")


def _folders(store: Store) -> tuple[Path, Path]:
    """The directories for what is computed about a store; the second is for a read-only store."""
    return store.path / "fingerprints", Path("~/.cache/granvit").expanduser()


def _make(store: Store, first: int, last: int) -> Iterator[bytes]:
    """The fingerprints of records `first` to `last` - 1, as bytes. Pillow and the hash release Python's lock, so threads do."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for one in pool.map(lambda index: _fingerprint(store, index), range(first, last)):
            yield one.tobytes()


def _fingerprint(store: Store, index: int) -> np.ndarray:
    found = np.zeros((), FINGERPRINT)
    try:
        record = store.record(index)
        return fingerprint_of(decode(record.image, MAX_PIXELS)) if record.image else found
    except ValueError:
        found["state"] = DAMAGED
        return found


def fingerprint_of(pixels_HW3: np.ndarray) -> np.ndarray:
    """The fingerprint of an image, upright RGB uint8: an entry of the array that `fingerprints` returns."""
    found = np.zeros((), FINGERPRINT)
    digest = hashlib.blake2b(repr(pixels_HW3.shape).encode(), digest_size=16)
    digest.update(pixels_HW3.tobytes())
    bits, structured = difference_hash(pixels_HW3)
    found["pixels"], found["bits"], found["state"] = digest.digest(), bits, STRUCTURED if structured else FLAT
    return found


@dataclass(frozen=True)
class Leak:
    """A held-out image (its index) that equals a training image, or nearly so. `distance`: differing bits; None: equal pixels."""

    held_out: int
    trained: int
    distance: int | None


def find_leaks(trained: np.ndarray, held_out: np.ndarray) -> list[Leak]:
    """For each held-out image that has one, its nearest training image. The arguments are arrays of `fingerprints`.

    The search misses no pair: if at most 31 bits differ, at least one of the 16 numbers of 16 bits differs in at most one bit. So
    only pairs with such a number are compared.
    """
    seen, ours = (np.flatnonzero(np.isin(part["state"], (FLAT, STRUCTURED))) for part in (trained, held_out))
    shared = np.isin(trained["pixels"][seen].view("S16"), held_out["pixels"][ours].view("S16"))
    by_pixels = {trained["pixels"][index].tobytes(): index for index in seen[shared].tolist()}
    found: dict[int, Leak] = {}
    for index in ours.tolist():
        equal = by_pixels.get(held_out["pixels"][index].tobytes())
        if equal is not None:
            found[index] = Leak(index, equal, None)
    theirs = np.flatnonzero(trained["state"] == STRUCTURED)
    asked = [index for index in np.flatnonzero(held_out["state"] == STRUCTURED).tolist() if index not in found]
    their_bits = trained["bits"][theirs]
    for number in range(SIDE):
        order = np.argsort(their_bits[:, number], kind="stable")
        sorted_numbers = their_bits[order, number]
        for mask in (0, *(1 << bit for bit in range(16))):
            wanted = held_out["bits"][asked, number] ^ np.uint16(mask)
            starts, ends = (np.searchsorted(sorted_numbers, wanted, side) for side in ("left", "right"))
            for position in np.flatnonzero(starts < ends).tolist():
                index, candidates = asked[position], order[starts[position] : ends[position]]
                differing = (their_bits[candidates] ^ held_out["bits"][index]).view(np.uint8)
                distances = np.unpackbits(differing, axis=1).sum(1)
                nearest = int(distances.argmin())
                distance, before = int(distances[nearest]), found.get(index)
                if distance <= NEAR and (before is None or before.distance is None or distance < before.distance):
                    found[index] = Leak(index, int(theirs[candidates[nearest]]), distance)
    return [found[index] for index in sorted(found)]


def shared_images(trained: Store, held_out: Store) -> str | None:
    """What `held_out` shares with the store `trained`, which is trained on, as the predicate of a sentence about `held_out`. None
    if no image of one is equal, or nearly equal, to one of the other; this result is kept and not computed again.

    Training images that cannot be decoded are counted in the log: training leaves them out too. `ValueError` for a held-out image
    that cannot be decoded.
    """
    if trained.path.resolve() == held_out.path.resolve():
        return "is also trained on"
    own = fingerprints(held_out)
    if damaged := np.flatnonzero(own["state"] == DAMAGED).tolist():
        raise ValueError(f"held-out store {held_out.path}: image {damaged[0]} cannot be decoded; build the store again")
    theirs = fingerprints(trained)
    if count := int((theirs["state"] == DAMAGED).sum()):
        log.warning(f"store {trained.path}: {count} images cannot be decoded and were not compared with {held_out.path}")
    passed = f"passed-{_digest(own)}-{_digest(theirs)}-{NEAR}"
    if any((folder / passed).exists() for folder in _folders(held_out)):
        return None
    leaks = find_leaks(theirs, own)
    if not leaks:
        _keep(held_out, passed, f"{held_out.path} shares no image with {trained.path}\n")
        return None
    named = [
        f"{held_out.record(leak.held_out).id} {'equals' if leak.distance is None else 'is nearly'} "
        f"{trained.record(leak.trained).id}" + ("" if leak.distance is None else f" ({leak.distance} of 256 bits differ)")
        for leak in leaks[:NAMED]
    ]
    more = f", and {len(leaks) - NAMED} more" if len(leaks) > NAMED else ""
    return (
        f"shares {len(leaks)} of its {held_out.records} images with {trained.path}, which is trained on: {'; '.join(named)}{more}"
    )


def _digest(found: np.ndarray) -> str:
    """Sixteen hex digits of a hash over the fingerprints of a store."""
    return hashlib.blake2b(found.view(np.uint8).data, digest_size=8).hexdigest()


def _keep(store: Store, name: str, text: str) -> None:
    """Writes a small file about a store. It appears complete or not at all."""
    for folder in _folders(store):
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            os.replace(temporary, folder / name)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    log.warning(f"neither {store.path} nor ~/.cache/granvit is writable: its comparison with training images is not kept")


def check_leakage(sources: Sequence[str], held_out: str) -> None:
    """`ValueError` if an image of the store `held_out` is equal, or nearly equal, to one of the stores `sources` (see
    `shared_images`)."""
    ours = Store(held_out)
    for source in dict.fromkeys(sources):
        found = shared_images(Store(source), ours)
        if found is not None:
            raise ValueError(f"held-out store {held_out} {found}. Build one without them, or name another eval.source")
