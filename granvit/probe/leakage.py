"""Compares the store of a probe with the training data of the probed runs and of the runs that they started from."""
from collections.abc import Iterable
from pathlib import Path

from granvit.checkpoint.history import chain
from granvit.checkpoint.run import Checkpoint
from granvit.data.leakage import shared_images
from granvit.data.store import Store


def not_held_out(checkpoints: Iterable[Checkpoint], store: Store) -> dict[Path, list[str]]:
    """For each checkpoint (key: its path) the reasons why `store` is not, or is not known to be, held out from its training; an
    empty list if it is.

    Compared are the stores in `data.sources` of the checkpoint's run and of all runs reached through `model.init_from`, each
    store once. A training store that is missing or has changed cannot be compared, which is a reason too. `ValueError` if an
    image of `store` cannot be decoded or a checkpoint is damaged.
    """
    known: dict[tuple[str, str | None], str | None] = {}
    found: dict[Path, list[str]] = {}
    for checkpoint in checkpoints:
        runs, missing = chain(checkpoint)
        reasons = found[checkpoint.path] = []
        if missing is not None:
            reasons.append(f"{_run(runs[0])}: no checkpoint in {missing} (model.init_from): that run's training data are unknown")
        for run in runs:
            for source in run.config.data.sources:
                key = source.path, run.fingerprints.get(f"store {source.path}")
                if key not in known:
                    known[key] = _reason(*key, store)
                if (reason := known[key]) is not None:
                    reasons.append(f"{_run(run)}: {reason}")
    return found


def _run(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.parents[1]


def _reason(path: str, fingerprint: str | None, store: Store) -> str | None:
    """Why `store` is not known to share no image with the training store at `path`, whose fingerprint the run recorded (None: not
    recorded)."""
    if fingerprint == store.fingerprint:
        return f"store {store.path} is also trained on"
    try:
        trained = Store(path)
    except ValueError as error:
        return f"its training data cannot be compared with {store.path} ({error})"
    if fingerprint is not None and fingerprint != trained.fingerprint:
        return (f"its training store {path} has changed since (fingerprint {trained.fingerprint}, then {fingerprint}) and cannot "
                f"be compared with {store.path}")  # fmt: skip
    shared = shared_images(trained, store)
    return None if shared is None else f"store {store.path} {shared}"
