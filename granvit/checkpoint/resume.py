"""Checks that a run may resume from a checkpoint: the same data, and no changed key that affects results."""
from collections.abc import Collection, Mapping

from granvit.checkpoint.run import Checkpoint
from granvit.config import RunConfig, differences
from granvit.models import LanguageConfig, VisionConfig

# Keys that a resumed run may change. Micro-batches, ranks, recomputation, device and kernels change the order of floating-point
# sums at most; the other keys do not affect results.
MAY_CHANGE = (
    "output", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.skip_non_finite",
    "train.micro_batch", "data.workers", "eval.", "runtime.device", "runtime.jit_level", "runtime.kernels", "runtime.compile",
    "runtime.recompute", "runtime.compile_cache", "ranks",
)  # fmt: skip
PER_DEVICE = ("train.micro_batch", "ranks")  # these affect results if train.loss_reduction is per_device
WHERE_STATED = ("runtime.compute",)  # changes all rounding: allowed only if given on the command line


def check_same_run(checkpoint: Checkpoint, config: RunConfig, vision: VisionConfig, language: LanguageConfig, ranks: int,
                   stated: Collection[str] = ()) -> list[str]:  # fmt: skip
    """`ValueError` naming every forbidden difference if `config` on `ranks` ranks may not resume the run of `checkpoint`.

    Returns the allowed differences as `key: old -> new`. `stated` are the keys given on the command line.
    """
    changed = differences(checkpoint.config, config)
    if checkpoint.ranks not in (None, ranks):
        changed.append(f"ranks: {checkpoint.ranks} -> {ranks}")
    unstated = [line for line in changed if line.startswith(WHERE_STATED) and line.partition(":")[0] not in stated]
    fixed = PER_DEVICE if config.train.loss_reduction == "per_device" else ()
    wrong = [line for line in changed if line.startswith(fixed) or not line.startswith(MAY_CHANGE + WHERE_STATED)]
    run = checkpoint.path.parents[1]
    if wrong:
        rows, questions = checkpoint.config.train.global_batch, config.train.global_batch
        counted = rows < questions == rows * config.data.regions_per_row  # as in checkpoints of format 1
        hint = f"train.global_batch counts rows: state train.global_batch={rows}. " if counted else ""
        raise ValueError(
            f"{run} holds a run of another configuration: {'; '.join(wrong + unstated)}. {hint}"
            f"Use the same configuration to resume it ({run / 'config.yaml'} has it), --fresh to start over, or another output="
        )
    if unstated:
        raise ValueError(
            f"{run} holds a run of another precision: {'; '.join(unstated)}. All later steps would round differently: "
            f"state runtime.compute={config.runtime.compute} on the command line if intended, or use the same configuration"
        )
    checkpoint.check_architecture(vision, language)
    return changed


def check_same_data(checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
    """`ValueError` naming the tokenizer and each store whose fingerprint differs from the one in `checkpoint`."""
    changed = [
        f"{what} has fingerprint {fingerprints[what]}, the run was trained on {before}"
        for what, before in checkpoint.fingerprints.items()
        if fingerprints[what] != before
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.path} was made from other data: {'; '.join(changed)}. Restore the old data, "
            f"use --fresh to start over, or another output="
        )
