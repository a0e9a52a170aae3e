"""Compares encoders on the regions of a store: is this encoder better at regions than the one it started from?

    python scripts/probe.py ENCODER [ENCODER ...] --source STORE [--framework mindspore|torch] [--out DIR]

An ENCODER is a run's directory (its newest checkpoint) or one checkpoint, a publisher's directory, or an exported one. All are
compared on the same regions of STORE, a region store. Runs that differ only in their seed become one column, their mean. A STORE
that shares images with the training data of a run, or of the runs that it started from, is refused. Name the start encoder first:
the table has the difference of each other encoder to the first.
Scores (docs/probe.md explains them), each with a 95% interval over images:

  kNN, linear probe      classes of regions from the frozen encoder's mean ROIAlign feature; trained on half of the images
  region-crop agreement  cosine of a region's ROIAlign features with the features of its own crop, relative to other crops
  Bbox2Caption loss      of the whole model, if the argument is a run

DIR gets report.html with a plot, report.md and probe.json. Exit status: 0 done, 2 refused.
"""
import argparse
import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from granvit.checkpoint.contents import open_contents
from granvit.checkpoint.run import Checkpoint, newest_checkpoint, open_checkpoint
from granvit.data.chat import Chat, load_chat
from granvit.data.store import Store
from granvit.exit_status import exit_status
from granvit.launch import load_engine_class
from granvit.logs import log, to_console
from granvit.memory import is_out_of_memory
from granvit.models import LEVELS, Level, VisionConfig
from granvit.probe.caption_loss import CaptionLosses, caption_losses, check_projector
from granvit.probe.features import RegionFeatures, compute_features, load_region_encoder
from granvit.probe.leakage import not_held_out
from granvit.probe.report import Probe, markdown, write_report
from granvit.probe.sample import LAST_WORD, TRAIN_IMAGES, WHOLE, Sample, Split, choose, size_groups, split
from granvit.probe.scores import (
    NEIGHBOURS,
    Score,
    SeedScore,
    bootstrap,
    linear_classes,
    mean,
    nearest_classes,
    relative_agreement,
)
from granvit.probe.seeds import seed_groups

COCO = 640 * 480  # pixels of a typical image of COCO, whose limits are areas of 32 x 32 and 96 x 96 pixels
SIZES = (round(32**2 / COCO, 4), round(96**2 / COCO, 4))
EXAMPLE = """example:
  python scripts/probe.py weights/siglip2-so400m-patch16-512 runs/stage1 --source data/heldout --framework torch
"""
_PROGRESS = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Candidate:
    """One encoder to probe: its directory, its name in the report, its configuration, the level that it states for its features,
    and what a run has besides."""

    path: Path
    name: str
    vision: VisionConfig
    level: Level
    checkpoint: Checkpoint | None
    chat: Chat | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoders", metavar="ENCODER", nargs="+", type=Path, help="a run, a publisher's directory or an export")
    parser.add_argument("--source", metavar="STORE", required=True, help="a region store")
    parser.add_argument("--framework", choices=("mindspore", "torch"), default="mindspore", help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/probe"), help="default: %(default)s")
    parser.add_argument("--label", metavar="RULE", default=WHOLE,
                        help=f"class of a region: {WHOLE} (the whole caption; default), {LAST_WORD}, or a regular expression "
                        "whose first match (or first group) in the caption is the class")  # fmt: skip
    parser.add_argument("--level", choices=LEVELS, help="features of all encoders (default: those that the runs' projectors "
                        "read; without a run, what a directory states, else penultimate)")  # fmt: skip
    parser.add_argument("--crop-size", metavar="PIXELS", type=int, help="side of the crops (default: what the encoder's patches "
                        "cover)")  # fmt: skip
    parser.add_argument("--sizes", nargs=2, type=float, metavar=("SMALL", "LARGE"), default=SIZES,
                        help="areas relative to the image: regions below SMALL are small, from LARGE on large (default: "
                        f"{SIZES[0]} {SIZES[1]}, COCO's 32 x 32 and 96 x 96 pixels of 640 x 480)")  # fmt: skip
    parser.add_argument("--images", type=int, default=1000, help="at most so many images (default: %(default)s)")
    parser.add_argument("--regions", type=int, default=8, help="at most so many regions of an image (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per batch, with their crops (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, choice of regions and bootstrap (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, else bfloat16")
    parser.add_argument("--allow-leakage", action="store_true",
                        help="go on although a run, or one that it started from, was trained on images of STORE, or its training "
                        "data cannot be compared with STORE; the report says so")  # fmt: skip
    parser.add_argument("--no-loss", action="store_true", help="do not compute the Bbox2Caption loss of runs")
    options = parser.parse_args(arguments)
    to_console(0)
    return exit_status(lambda: _probe(options), [])


def _probe(options: argparse.Namespace) -> None:
    started = time.monotonic()
    _check_options(options)
    Engine = load_engine_class(options.framework)
    names = short_names(options.encoders)
    candidates = [_open(path, name, options.no_loss) for path, name in zip(options.encoders, names, strict=True)]
    levels = _levels(candidates, options.level)
    joined = seed_groups({each.name: each.checkpoint for each in candidates if each.checkpoint is not None})
    if joined and importlib.util.find_spec("scipy") is None:
        raise ValueError("runs of several seeds: their intervals need scipy: pip install scipy")
    for candidate in candidates:
        if options.crop_size is not None and (options.crop_size <= 0 or options.crop_size % candidate.vision.patch_size):
            raise ValueError(f"--crop-size {options.crop_size} is not a multiple of the patch size of {candidate.path}, "
                             f"{candidate.vision.patch_size}")  # fmt: skip
    sample = choose(Store(options.source), options.images, options.regions, options.seed)
    division = split(sample, options.label, options.seed)
    groups = size_groups(sample.area_R, *options.sizes)
    log.info(f"{len(sample.images)} images, {len(sample.captions_R)} regions, {len(division.names)} classes")
    scores: dict[str, dict[tuple[str, str], Score]] = {}
    losses_of: dict[str, CaptionLosses] = {}
    facts = _check_held_out(candidates, sample.store, options.allow_leakage)
    for candidate, level in zip(candidates, levels, strict=True):
        crop_size = options.crop_size or candidate.vision.covered_pixels
        encoder = load_region_encoder(options.framework, candidate.path, level, crop_size, options.dtype, options.device)
        progress = Progress(f"{candidate.name}: features", len(sample.images))
        with memory_errors(progress.what, _smaller_features(options)):
            features = compute_features(encoder, candidate.vision, crop_size, sample, options.batch, progress)
        device, dtype = encoder.device, encoder.dtype_name
        del encoder  # its memory, before a run's whole model is loaded
        found, penalty = _scores(features, sample, division, groups, options.seed)
        facts.append(
            f"{candidate.name}: {candidate.path}{_step(candidate)}, {candidate.vision.image_size} pixels, width "
            f"{candidate.vision.width}, level {level}, crops of {crop_size} pixels, penalty of the linear probe {penalty:g}"
        )
        if candidate.checkpoint is not None and candidate.chat is not None:
            progress = Progress(f"{candidate.name}: Bbox2Caption loss", len(sample.images))
            with memory_errors(progress.what, SMALLER_LOSS):
                losses = caption_losses(candidate.checkpoint, candidate.chat, Engine, sample, device, dtype, progress)
            losses_of[candidate.name] = losses
            per_token = lambda loss, tokens: loss / tokens  # noqa: E731
            found["loss", "all"] = bootstrap(per_token, losses.image_N, losses.loss_N, losses.tokens_N, seed=options.seed,
                                             regions=losses.questions)  # fmt: skip
            if losses.too_long:
                facts.append(f"{candidate.name}: {losses.too_long} regions have no loss: they do not fit into its longest row")
            if losses.unusable:
                facts.append(f"{candidate.name}: {losses.unusable} regions have no loss: their images are above its "
                             "data.max_pixels")  # fmt: skip
        scores[candidate.name] = found
    settings = vars(options) | {"encoders": [str(path) for path in options.encoders], "out": str(options.out), "device": device,
                                "dtype": dtype, "sizes": list(options.sizes), "level": list(levels),
                                "store": sample.store.fingerprint, "classes": list(division.names)}  # fmt: skip
    facts = [*_sample_facts(sample, division, groups, options), *facts]
    facts.append(f"{options.framework} on {device}, {dtype}")
    facts += [f"{column}: the mean of {', '.join(f'{run} (seed {seed})' for seed, run in runs.items())}"
              for column, runs in joined.items()]  # fmt: skip
    columns = join_seeds(scores, joined)
    first_runs = {column: next(iter(joined[column].values())) if column in joined else column for column in columns}
    reasons = unpaired_losses(list(first_runs.values()), losses_of)
    unpaired = {column: reasons[run] for column, run in first_runs.items() if run in reasons}
    first = next(iter(columns))
    facts += [f"No difference of the Bbox2Caption losses of {name} and {first}: {why}" for name, why in unpaired.items()]
    probe = Probe(tuple(columns), columns, tuple(facts), settings, unpaired)
    write_report(probe, options.out)
    print(markdown(probe))
    log.info(f"{options.out / 'report.html'}, report.md and probe.json were written; {time.monotonic() - started:.0f} s")


def _check_options(options: argparse.Namespace) -> None:
    for name in ("images", "regions", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1")
    small, large = options.sizes
    if not 0 <= small <= large <= 1:
        raise ValueError(f"--sizes {small:g} {large:g}: expected two areas relative to the image, 0 <= SMALL <= LARGE <= 1")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report's plot needs matplotlib: pip install matplotlib")


def _smaller_features(options: argparse.Namespace) -> str:
    """What to do if memory runs out while features are computed."""
    smaller = [f"--batch {options.batch // 2}"] if options.batch > 1 else []
    smaller += [f"--regions {options.regions // 2}"] if options.regions > 1 else []
    return f"take {' or '.join(smaller)}" if smaller else "--batch and --regions are 1 already; take a smaller --crop-size"


SMALLER_LOSS = "it is computed one row at a time, so --batch does not matter; --no-loss leaves it out"


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error into a `ValueError` of one line: during what it happened, and the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (str(error).strip() or "MemoryError").splitlines()[0]
        raise ValueError(f"{what}: out of memory ({message}): {remedy}") from error


def unpaired_losses(names: Sequence[str], losses_of: Mapping[str, CaptionLosses]) -> dict[str, str]:
    """Why the Bbox2Caption loss of an encoder cannot be compared with that of the first, by name; comparable ones are absent."""
    first, found = losses_of.get(names[0]), {}
    for name in names[1:]:
        own = losses_of.get(name)
        if own is None:
            continue
        if first is None:
            found[name] = f"{names[0]} has no loss"
        elif own.tokenizer != first.tokenizer:
            found[name] = "their tokenizers or chat templates differ, so their tokens are not the same"
        elif differing := int((own.asked_R != first.asked_R).sum()):
            found[name] = f"they are not of the same regions: {differing} regions have a loss in only one of the two"
    return found


def short_names(paths: Sequence[Path]) -> list[str]:
    """For each path the fewest of its last parts that distinguish it from the others; `ValueError` if a path is there twice."""
    parts = [path.absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"an encoder is named twice: {', '.join(map(str, paths))}")
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        length = next(n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-length:]))
    return names


def _open(path: Path, name: str, no_loss: bool) -> Candidate:
    """Opens an encoder's directory without reading tensors. `ValueError` if it holds no encoder or does not fit together."""
    checkpoint = chat = None
    if (path / "state.json").exists():
        checkpoint = open_checkpoint(path)
    elif (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
    if checkpoint is not None:
        check_projector(checkpoint)
        if not no_loss:
            chat = _chat(checkpoint)
    source, _, contents = open_contents(path)
    if contents.vision is None or not contents.stated:
        raise ValueError(f"{path}: holds no encoder with a config.json; name a run, a publisher's directory or an export")
    exported = (source.tree or {}).get("granvit")  # the record of scripts/export_hf.py
    level = exported.get("level") if isinstance(exported, dict) else None
    return Candidate(path, name, contents.vision, level or contents.vision.level, checkpoint, chat)


def _chat(checkpoint: Checkpoint) -> Chat | None:
    """The run's chat template; None for a run that was trained without questions."""
    try:
        chat = load_chat(checkpoint.config, checkpoint.language)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}; --no-loss leaves out the Bbox2Caption loss") from None
    if chat.plain:
        log.info(f"{checkpoint.path}: {checkpoint.config.stage} was trained without questions: no Bbox2Caption loss")
    return None if chat.plain else chat


def _levels(candidates: Sequence[Candidate], asked: Level | None) -> list[Level]:
    """The level whose features each encoder is probed by (see --level)."""
    of_runs = dict.fromkeys(candidate.level for candidate in candidates if candidate.checkpoint is not None)
    if asked is None and len(of_runs) > 1:
        raise ValueError(f"the projectors of these runs read different levels, {', '.join(of_runs)}; choose one with --level")
    of_all = asked or next(iter(of_runs), None)
    levels = [of_all or candidate.level for candidate in candidates]
    for candidate, level in zip(candidates, levels, strict=True):
        if level not in candidate.vision.available_levels:
            held = ", ".join(candidate.vision.available_levels)
            raise ValueError(f"{candidate.path}: has no features at the level {level!r}, only {held}; choose one with --level")
    return levels


def _scores(features: RegionFeatures, sample: Sample, division: Split, groups: dict[str, np.ndarray],
            seed: int) -> tuple[dict[tuple[str, str], Score], float]:  # fmt: skip
    """The scores of one encoder that need no decoder, by (key, group), and the penalty of the linear probe."""
    train, test, class_R = division.train_R, division.test_R, division.class_R
    train_RC, test_RC = features.features_NC[train], features.features_NC[test]
    nearest = nearest_classes(train_RC, class_R[train], test_RC) == class_R[test]
    predicted, penalty = linear_classes(train_RC, class_R[train], test_RC, len(division.names))
    found: dict[tuple[str, str], Score] = {}
    for group, mask_R in groups.items():
        tested = mask_R[test]
        for key, correct in (("nearest", nearest), ("linear", predicted == class_R[test])):
            if tested.any():
                found[key, group] = bootstrap(mean, sample.image_R[test][tested], correct[tested], seed=seed)
        paired = mask_R & np.isfinite(features.matched_N)
        if paired.any():
            own, others, images = features.matched_N[paired], features.mismatched_N[paired], sample.image_R[paired]
            found["agreement", group] = bootstrap(relative_agreement, images, own, others, seed=seed)
            found["matched", group] = bootstrap(mean, images, own, seed=seed)
            found["mismatched", group] = bootstrap(mean, images, others, seed=seed)
    return found, penalty


def _step(candidate: Candidate) -> str:
    return "" if candidate.checkpoint is None else f" after step {candidate.checkpoint.step}"


def _check_held_out(candidates: Sequence[Candidate], store: Store, allowed: bool) -> list[str]:
    """Lines that say of each encoder whether the store is held out from its training. `ValueError` if a run was trained on an
    image of the store, or its training data cannot be compared with the store, unless this is `allowed` (see --allow-leakage)."""
    reasons = not_held_out([candidate.checkpoint for candidate in candidates if candidate.checkpoint is not None], store)
    found = [reason for of_one in reasons.values() for reason in of_one]
    more = f" (and {len(found) - 1} more reasons)" if len(found) > 1 else ""
    if found and not allowed:
        raise ValueError(f"{found[0]}{more}. Name a --source of other images; with --allow-leakage the probe goes on and its "
                         "report says so")  # fmt: skip
    lines = []
    for candidate in candidates:
        if candidate.checkpoint is None:
            lines.append(f"{candidate.name}: not a run, so its training data are unknown and were not compared with the store")
        elif own := reasons[candidate.checkpoint.path]:
            lines += [f"{candidate.name}: NOT KNOWN TO BE HELD-OUT IMAGES (--allow-leakage): {reason}" for reason in own]
        else:
            lines.append(f"{candidate.name}: its training data, and those of the runs before it, share no image with the store")
    if found:
        log.warning(f"--allow-leakage: {found[0]}{more}")
    return lines


def _sample_facts(sample: Sample, division: Split, groups: dict[str, np.ndarray], options: argparse.Namespace) -> list[str]:
    store, train, test = sample.store, division.train_R, division.test_R
    counts = np.bincount(division.class_R[train], minlength=len(division.names))
    commonest = int(counts.argmax())
    baseline = (division.class_R[test] == commonest).mean()
    small, large = options.sizes
    alone = int((np.bincount(sample.image_R) == 1).sum())
    facts = [
        f"Store {store.path} ({store.fingerprint}): {len(sample.images)} images, {len(sample.captions_R)} regions"
        + (f"; {sample.left_out} more of these images were left out (--regions {options.regions})" * (sample.left_out > 0)),
        f"Classes by --label {options.label}: {len(division.names)}; {train.sum()} regions train, {test.sum()} test, in halves "
        f"of the images; always answering the commonest class, {division.names[commonest]!r}, is right for {baseline:.1%}",
        f"kNN: {NEIGHBOURS} neighbours by cosine. Linear probe: ridge regression to one-hot targets",
        f"Area relative to the image: small below {small:g}, large from {large:g} on ("
        + ", ".join(f"{name} {int(mask.sum())}" for name, mask in groups.items() if name != "all") + " regions)",
    ]  # fmt: skip
    rare, without = division.distinct - len(division.names), int((division.class_R < 0).sum())
    if without:
        facts.append(f"{without} regions are in no class: their caption gives none, or one of the {rare} classes that have no "
                     f"regions in {TRAIN_IMAGES} training images and a test image")  # fmt: skip
    if alone:
        facts.append(f"{alone} images have one region, and so no other crop: they are not in the region-crop scores")
    return facts


def join_seeds(scores: Mapping[str, dict[tuple[str, str], Score]],
               joined: Mapping[str, Mapping[int, str]]) -> dict[str, dict[tuple[str, str], Score]]:  # fmt: skip
    """The scores with the runs of each column of `joined` replaced by their mean over seeds, at the place of its first run."""
    column_of = {name: column for column, runs in joined.items() for name in runs.values()}
    found: dict[str, dict[tuple[str, str], Score]] = {}
    for name, own in scores.items():
        column = column_of.get(name)
        if column is None:
            found[name] = own
        elif column not in found:
            of_seed = {seed: scores[run] for seed, run in joined[column].items()}
            found[column] = {key: SeedScore.of({seed: each[key] for seed, each in of_seed.items()})
                             for key in own if all(key in each for each in of_seed.values())}  # fmt: skip
    return found


class Progress:
    """Logs how many of `total` images are finished, every few seconds and at the end."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.finished = what, total, 0
        self.started = self.logged = time.monotonic()

    def __call__(self, images: int) -> None:
        self.finished += images
        now = time.monotonic()
        if now - self.logged > _PROGRESS or self.finished == self.total:
            self.logged = now
            rate = self.finished / max(now - self.started, 1e-9)
            log.info(f"{self.what}: {self.finished} of {self.total} images, {rate:.1f} images/s")
