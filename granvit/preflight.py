"""Checks before the first step that all ranks have the same versions, configuration, data and weights. Rank 0 chooses the
checkpoint; every rank hashes what it loaded itself. If one differs, all ranks stop (`granvit.agreement`)."""
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from granvit.agreement import Fact, agree, broadcast, together
from granvit.checkpoint.run import Checkpoint, newest_step, open_checkpoint, step_directory
from granvit.checkpoint.run_writer import versions
from granvit.checkpoint.tensors import set_digest, tensor_digest
from granvit.config import RunConfig
from granvit.data.chat import Chat
from granvit.data.loader import Loader
from granvit.data.store import Store
from granvit.engine import Ranks
from granvit.launch import FRAMEWORKS, Framework
from granvit.models import PARTS, LanguageConfig, VisionConfig, part_of

log = logging.getLogger("granvit")
SEEN_WITHIN = 90.0  # seconds to wait for a file written by rank 0; NFS caches a directory's listing for up to 60
PROGRESS = 10.0  # seconds between two log lines about loading
TOKENIZER = "tokenizer"  # key of the tokenizer's fingerprint; those of stores are `store PATH`


def version_facts(framework: Framework) -> dict[str, Fact]:
    """Versions of Python and of the installed packages that can change a result, and one hash of granvit's source files
    (different checkouts have the same version number)."""
    others = {module for module in ("mindspore", "torch") if module != framework}
    facts = {f"version of {name}": Fact(version) for name, version in versions().items() if name not in others}
    facts["version of Python"] = Fact(platform.python_version())
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in ("granvit", FRAMEWORKS[framework][0]):
        for file in sorted(path for path in (root / package).rglob("*") if path.suffix in (".py", ".cpp", ".h")):
            digest.update(f"{file.relative_to(root)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return facts | {"source code": Fact(digest.hexdigest()[:16], str(root))}


def configuration_facts(config: RunConfig, vision: VisionConfig, language: LanguageConfig, path: Path) -> dict[str, Fact]:
    """Every key of the resolved configuration and of the encoder's and decoder's configurations."""
    facts: dict[str, Fact] = {}
    for prefix, tree, origin in (
        ("", config, str(path.resolve())),
        (f"model {vision.name} ", vision, ""),
        (f"model {language.name} ", language, ""),
    ):
        facts |= {f"{prefix}{key}": Fact(value, origin) for key, value in _leaves(tree.model_dump(mode="json"), "")}
    return facts


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    if not isinstance(tree, dict):
        yield key, json.dumps(tree)
        return
    for name, below in tree.items():
        yield from _leaves(below, f"{key}.{name}" if key else name)


def fingerprints(config: RunConfig, chat: Chat) -> dict[str, str]:
    """Fingerprints of the tokenizer with its chat template, and of each store in `data.sources`."""
    return {TOKENIZER: chat.contents_fingerprint} | _stores([source.path for source in config.data.sources])


def _stores(paths: Iterable[str]) -> dict[str, str]:
    return {f"store {path}": Store(path, check=False).fingerprint for path in paths}


def data_facts(config: RunConfig, chat: Chat, trained_on: dict[str, str]) -> dict[str, Fact]:
    """Facts for the fingerprints in `trained_on` (see `fingerprints`) and for that of the held-out store."""
    held_out = _stores([] if config.eval.source is None else [config.eval.source])
    all_data = trained_on | held_out
    facts = {what: Fact(value, str(Path(what.removeprefix("store ")).resolve())) for what, value in all_data.items()}
    return facts | {TOKENIZER: Fact(trained_on[TOKENIZER], chat.origin)}


def order_facts(loader: Loader) -> dict[str, Fact]:
    """A hash of every store's token lengths, which determine the order of the data; each node may have its own copy."""
    counted = zip(loader.plan.stores, loader.plan.lengths, strict=True)
    return {f"token lengths of {store.path}": Fact(lengths.digest()[:16]) for store, lengths in counted}


def agreed_checkpoint(ranks: Ranks, run: Path, wanted: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint that rank 0 finds in a run's directory, opened on every rank; None if there is none, or if
    `wanted` is false on rank 0. Only rank 0 lists the directory. All ranks must call it.

    `Refused` if a rank does not see the checkpoint or has other files under its name. Only state.json and the files of hashes are
    compared here: tensors are checked against these hashes when they are read.
    """
    chosen = together(ranks, lambda: newest_step(run) if wanted and ranks.rank == 0 else None)
    step = broadcast(ranks, "" if chosen is None else str(chosen), 0)
    if not step:
        return None
    checkpoint = together(ranks, lambda: _open_when_seen(step_directory(run, int(step))))
    digests = together(ranks, lambda: _digests(checkpoint))
    agree(ranks, {name: Fact(digest[:16], str(checkpoint.path.resolve() / name)) for name, digest in digests.items()})
    return checkpoint


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    files = sorted(checkpoint.path.glob("*.sha256.json"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} | {"state.json": checkpoint.digest}


def _open_when_seen(path: Path) -> Checkpoint:
    """Opens a checkpoint that rank 0 sees. A network file system may show it to this node later: waits up to `SEEN_WITHIN`."""
    deadline = time.monotonic() + SEEN_WITHIN
    while not (path / "state.json").is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path.resolve()} does not exist on this rank, but rank 0 sees it (waited {SEEN_WITHIN:.0f} s); all nodes must "
                f"share the run's directory"
            )
        with suppress(OSError):
            os.listdir(path.parent)  # makes the file system refresh its cache
        time.sleep(min(1.0, SEEN_WITHIN))
    return open_checkpoint(path)


class Loading:
    """Passes tensors on to an engine, logs the progress, and with `hashed` hashes them in their stored dtype."""

    def __init__(self, what: str, total: int, hashed: bool):
        self.what, self.total, self.hashed = what, total, hashed
        self.digests: dict[str, str] = {}

    def watch(self, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors unchanged."""
        start = logged = time.monotonic()
        count = size = 0
        for name, array in tensors:
            if self.hashed:
                self.digests[name] = tensor_digest(array)
            yield name, array
            count, size, now = count + 1, size + array.nbytes, time.monotonic()
            if now - logged > PROGRESS:
                logged = now
                rate = size / 1e9 / (now - start)
                log.info(f"{self.what}: {count} of {self.total} tensors, {size / 1e9:.1f} GB, {rate:.2f} GB/s")
        log.info(f"{self.what}: {count} tensors, {size / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")

    def hashes(self) -> dict[str, str]:
        """part -> hash of the part's loaded tensors."""
        return {part: set_digest({n: d for n, d in self.digests.items() if part_of(n) == part}) for part in PARTS}


def weights_facts(hashes: dict[str, str], config: RunConfig, language: LanguageConfig,
                  source: Checkpoint | None) -> dict[str, Fact]:  # fmt: skip
    """The hash of each part's weights, and the directory or seed that they come from. `source` is the checkpoint that they were
    loaded from, of this run or of `model.init_from` (None: no checkpoint)."""
    seed = f"random from seed {config.seed}"
    origins = dict.fromkeys(PARTS, seed)
    if config.model.init != "random":
        origins["vision"] = str(Path(config.model.weights_vision).resolve())
        origins["language"] = str(Path(config.model.weights_language).resolve())
    if source is not None:
        taken = PARTS if source.language.is_built_like(language) else ("vision",)
        origins |= dict.fromkeys(taken, str(source.path.resolve()))
    return {f"weights of {part}": Fact(hashes[part][:16], origins[part]) for part in PARTS}
