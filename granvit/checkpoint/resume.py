"""Which run may go on from a checkpoint: the same configuration but for what changes no result, and the same data."""
from collections.abc import Collection, Mapping

from granvit.checkpoint.run import Checkpoint
from granvit.config import RunConfig, differences
from granvit.models import LanguageConfig, VisionConfig

# What a resumed run may change. How a global batch is divided (micro-batches, ranks), whether activations are computed again, and
# on which device: these change the order of floating-point sums at most.
MAY_CHANGE = (
    "output", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.skip_non_finite",
    "train.micro_batch", "data.workers", "eval.", "runtime.device", "runtime.jit_level", "runtime.attention",
    "runtime.recompute", "ranks",
)  # fmt: skip
PER_DEVICE = ("train.micro_batch", "ranks")  # enter the result where train.loss_reduction averages means of each device
WHERE_STATED = ("runtime.compute",)  # changes every rounding: only where the command line says so


def check_same_run(checkpoint: Checkpoint, config: RunConfig, vision: VisionConfig, language: LanguageConfig, ranks: int,
                   stated: Collection[str] = ()) -> list[str]:  # fmt: skip
    """`ValueError` naming every difference where `config` on so many ranks may not continue the run that `checkpoint` belongs to.

    Returns the differences that may be, as `key: old -> new`. `stated` are the keys given on the command line.
    """
    changed = differences(checkpoint.config, config)
    if checkpoint.ranks not in (None, ranks):
        changed.append(f"ranks: {checkpoint.ranks} -> {ranks}")
    unstated = [line for line in changed if line.startswith(WHERE_STATED) and line.partition(":")[0] not in stated]
    fixed = PER_DEVICE if config.train.loss_reduction == "per_device" else ()
    wrong = [line for line in changed if line.startswith(fixed) or not line.startswith(MAY_CHANGE + WHERE_STATED)]
    run = checkpoint.path.parents[1]
    if wrong:
        raise ValueError(
            f"{run} holds a run of another configuration: {'; '.join(wrong + unstated)}. "
            f"Use the same configuration to resume it ({run / 'config.yaml'} has it), --fresh to start over, or another output="
        )
    if unstated:
        raise ValueError(
            f"{run} holds a run of another precision: {'; '.join(unstated)}. Every later step would round otherwise: "
            f"state runtime.compute={config.runtime.compute} on the command line if that is meant, or use the same configuration"
        )
    checkpoint.check_architecture(vision, language)
    return changed


def check_same_data(checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
    """`ValueError` naming each store, or the tokenizer, that is not the one the run was trained on until `checkpoint`."""
    changed = [
        f"{what} has fingerprint {fingerprints[what]}, the run was trained on {before}"
        for what, before in checkpoint.fingerprints.items()
        if fingerprints[what] != before
    ]
    if changed:
        raise ValueError(
            f"{checkpoint.path} was made from other data: {'; '.join(changed)}. Put back what was there, "
            f"use --fresh to start over, or another output="
        )
